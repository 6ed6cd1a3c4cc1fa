"""The torch ops of `swiglu`: schemas and gradient, whatever runs inside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from realign_kernels.differentiable import DifferentiableOp, Signature


def define(name: str, run: Callable, run_backward: Callable) -> DifferentiableOp:
    """The ops `name`, from gate and up, and `name_backward`, from the gradient of the result, gate and up."""
    return DifferentiableOp(name, (_FORWARD, run), (_BACKWARD, run_backward), _save, _differentiate)


def allocate(gate: Tensor, up: Tensor) -> Tensor:
    """The result, not computed."""
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def allocate_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, not computed."""
    return allocate(gate, up), allocate(gate, up)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(backward, ctx, grad):
    return backward(grad, *ctx.saved_tensors)


_FORWARD = Signature("Tensor gate, Tensor up", "Tensor", allocate)
_BACKWARD = Signature("Tensor grad, Tensor gate, Tensor up", "(Tensor, Tensor)", allocate_backward)
