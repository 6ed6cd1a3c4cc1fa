"""The torch ops of `mot_norm`: schemas and gradient, whatever runs inside. L tokens, E width, W experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from realign_kernels.differentiable import DifferentiableOp, Signature


def define(name: str, run: Callable, run_backward: Callable) -> DifferentiableOp:
    """The ops `name` and `name_backward`.

    Forward gives the normed rows, the sum with the residual (empty without one) and float32 [L] each row's
    `1 / sqrt(mean(x^2) + eps)`; backward the gradients of the sum, in its dtype, and of the weights,
    float32 [W, E].
    """
    return DifferentiableOp(name, (_FORWARD, run), (_BACKWARD, run_backward), _save, _differentiate)


def allocate(
    hidden: Tensor,
    residual: Tensor | None,
    und: Tensor,
    gen: Tensor | None,
    expert: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The results of forward, not computed."""
    dtype, device = hidden.dtype, hidden.device
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    normed = torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)
    total = torch.empty((0, 0), dtype=dtype, device=device) if residual is None else torch.empty_like(normed)
    return normed, total, torch.empty(hidden.shape[0], dtype=torch.float32, device=device)


def allocate_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    scale: Tensor,
    und: Tensor,
    gen: Tensor | None,
    expert: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The results of backward, not computed."""
    weights_shape = (1 if gen is None else 2, x.shape[1])
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty(weights_shape, dtype=torch.float32, device=x.device),
    )


def _save(ctx, inputs, output):
    hidden, residual, und, gen, expert, _ = inputs
    _, total, scale = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = (hidden.dtype, None if residual is None else residual.dtype)
    ctx.save_for_backward(hidden if residual is None else total, scale, und, gen, expert)


def _differentiate(backward, ctx, grad_normed, grad_total, _):
    x, scale, und, gen, expert = ctx.saved_tensors
    if ctx.dtypes[1] is None:
        grad_total = None  # the compiler gives the empty sum an empty gradient
    if grad_normed is None:
        grad_normed = torch.zeros_like(x)
    grad_x, grad_weights = backward(grad_normed, grad_total, x, scale, und, gen, expert)
    grad_hidden, grad_residual = (None if dtype is None else grad_x.to(dtype) for dtype in ctx.dtypes)
    grad_gen = None if gen is None else grad_weights[1].to(gen.dtype)
    return grad_hidden, grad_residual, grad_weights[0].to(und.dtype), grad_gen, None, None


_WEIGHTS = "Tensor und, Tensor? gen, Tensor? expert"
_FORWARD = Signature(
    f"Tensor hidden, Tensor? residual, {_WEIGHTS}, float eps", "(Tensor, Tensor, Tensor)", allocate
)
_BACKWARD = Signature(
    f"Tensor grad_normed, Tensor? grad_total, Tensor x, Tensor scale, {_WEIGHTS}",
    "(Tensor, Tensor)",
    allocate_backward,
)
