"""Settings for all tests, for busy machines.

One torch thread, because two on two busy cores can be far slower than one; no deadlines for drawn examples,
because they measure the machine's other work. Where there is no GPU, Triton's kernels run in its interpreter,
which must be chosen before Triton is first imported: here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    settings.register_profile("no-deadline", deadline=None)
    settings.load_profile("no-deadline")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Commands that are tested in this process choose their threads; the next test has one again."""
    yield
    torch.set_num_threads(1)
