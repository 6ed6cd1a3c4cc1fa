"""Settings for all tests: one torch thread, because two on two busy cores can be far slower than one."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
