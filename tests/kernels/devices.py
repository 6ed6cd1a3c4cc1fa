"""Where an implementation's tests run: Triton and CUDA on a GPU where there is one, the rest on the CPU."""

from __future__ import annotations

import torch


def device_of(impl: str) -> torch.device:
    """The device for the tensors of a test of `impl`."""
    is_gpu = impl in ("triton", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if is_gpu else "cpu")
