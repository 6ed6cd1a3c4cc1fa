"""What the tests of the model's ops share."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor


def find_ops(name: str, impl: str) -> tuple[torch._ops.OpOverload, ...]:
    """The torch ops of a path of an op, forward and backward."""
    importlib.import_module(f"realign_kernels.{name}.{impl}")
    name = name if impl == "cpp" else f"{name}_{impl}"
    return tuple(getattr(torch.ops.realign_kernels, f"{name}{end}").default for end in ("", "_backward"))


def refuse_copies(contiguous: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Tensor.contiguous` that fails where it would copy."""

    def run(tensor: Tensor, *args, **kwargs) -> Tensor:
        assert tensor.is_contiguous(), f"strides {tensor.stride()} of {tuple(tensor.shape)} are copied"
        return contiguous(tensor, *args, **kwargs)

    return run


def assert_as_exact(actual: Tensor, plain: Tensor, exact: Tensor, term: float = 0.0) -> None:
    """The error against float64 is at most twice that of plain torch in this dtype.

    Or as many units in the last place as there are roundings in a row: one of a 16-bit number, which is kept
    in float32 in between; three of a float32. `term` is the size of terms that may cancel in the result.
    """
    assert actual.shape == exact.shape
    actual, plain, exact = actual.cpu(), plain.cpu(), exact.cpu()
    if exact.numel() == 0:
        return
    size = exact.abs().max()
    least = 3 * torch.finfo(torch.float32).eps * max(size, term)
    if actual.dtype != torch.float32:
        least += torch.finfo(actual.dtype).eps * size
    allowed = max(2 * (plain.double() - exact).abs().max(), least)
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"
