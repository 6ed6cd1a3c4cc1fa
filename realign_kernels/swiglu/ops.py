"""The torch ops of `swiglu`: schemas and gradient, whatever runs inside.

`up` is None where `gate` holds both halves; the gradient of `gate` then is that of both, that of `up` empty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from realign_kernels.differentiable import DifferentiableOp, Signature


def define(name: str, run: Callable, run_backward: Callable) -> DifferentiableOp:
    """The ops `name`, from gate and up, and `name_backward`, from the gradient of the result, gate and up."""
    return DifferentiableOp(name, (_FORWARD, run), (_BACKWARD, run_backward), _save, _differentiate)


def allocate(gate: Tensor, up: Tensor | None) -> Tensor:
    """The result, not computed."""
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    return torch.empty(shape, dtype=gate.dtype, device=gate.device)


def allocate_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, not computed."""
    shapes = (gate.shape, 0 if up is None else up.shape)
    grad_gate, grad_up = (torch.empty(shape, dtype=gate.dtype, device=gate.device) for shape in shapes)
    return grad_gate, grad_up


def as_rows(numbers: Tensor) -> Tensor:
    """A tensor as rows of numbers that lie together, [L, E]: a view, unless its strides forbid it."""
    if numbers.dim() != 2:
        width = numbers.shape[-1] if numbers.dim() else 1
        numbers = numbers.reshape(numbers.shape[:-1].numel(), width)
    return numbers if numbers.stride(1) == 1 else numbers.contiguous()


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(backward, ctx, grad):
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = backward(grad, gate, up)
    return grad_gate, None if up is None else grad_up


_FORWARD = Signature("Tensor gate, Tensor? up", "Tensor", allocate)
_BACKWARD = Signature("Tensor grad, Tensor gate, Tensor? up", "(Tensor, Tensor)", allocate_backward)
