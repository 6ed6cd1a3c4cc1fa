"""Definition of `swiglu` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate)`, in float32 or wider, returned to the dtype of `gate`, times `up`."""
    return _Silu.apply(gate) * up


class _Silu(torch.autograd.Function):
    """`gate / (1 + exp(-gate))`, an element's bits being those of its value alone.

    `torch.nn.functional.silu` is faster, but on a CPU it takes the last elements of a tensor, and those where
    two threads meet, by another routine: a row's last bits then depend on the rows beside it.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor) -> Tensor:
        ctx.save_for_backward(gate)
        wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
        return wide.neg().exp_().add_(1).reciprocal_().mul_(wide).to(gate.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (gate,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, gate)
