"""Definition of `swiglu` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def swiglu_reference(gate: Tensor, up: Tensor | None) -> Tensor:
    """`silu(gate)`, in float32 or wider, returned to the dtype of `gate`, times `up`."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return _Silu.apply(gate) * up


class _Silu(torch.autograd.Function):
    """`gate / (1 + exp(-gate))`, an element's bits being those of its value alone, and so its gradient's.

    `torch.nn.functional.silu` is faster, but on a CPU it takes the last elements of a tensor, and those where
    two threads meet, by another routine: a row's last bits then depend on the rows beside it.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        wide = _widen(gate)
        return _sigmoid(wide).mul_(wide).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (gate,) = ctx.saved_tensors
        wide = _widen(gate)
        sigmoid = _sigmoid(wide)
        slope = sigmoid * (1 + wide * (1 - sigmoid))
        return (_widen(grad) * slope).to(gate.dtype)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sigmoid(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_()
