"""Fresh memory holds NaN in these tests: an output that an op forgets to write cannot look right."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import launch
from tests.kernels.interpreter import install_bfloat16

if launch.is_interpreting():
    install_bfloat16()


@pytest.fixture(autouse=True)
def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch.empty and torch.empty_like by versions that fill floats with NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return make_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
