"""Settings for all tests, for busy machines.

One torch thread, because two on two busy cores can be far slower than one; no deadlines for drawn examples,
because they measure the machine's other work.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    settings.register_profile("no-deadline", deadline=None)
    settings.load_profile("no-deadline")
