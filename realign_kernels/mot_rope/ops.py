"""The torch ops of `mot_rope`: schemas and gradient, whatever runs inside. W experts, D head dim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from realign_kernels.differentiable import DifferentiableOp, Signature


class Inputs(NamedTuple):
    """The tensors of a call, in the order of the ops' arguments."""

    query: Tensor
    key: Tensor
    cos: Tensor
    sin: Tensor
    und_query: Tensor | None
    gen_query: Tensor | None
    und_key: Tensor | None
    gen_key: Tensor | None
    expert: Tensor | None
    index: Tensor | None


def define(name: str, run: Callable, run_backward: Callable) -> DifferentiableOp:
    """The ops `name` and `name_backward`.

    `run(inputs, eps)` gives queries and keys; `run_backward(inputs, grads, eps)` the gradients of queries
    and keys, and of the weights, float32 [2, W, D], queries' first.
    """

    def forward(*arguments):
        return run(Inputs(*arguments[:-1]), arguments[-1])

    def backward(grad_query, grad_key, *arguments):
        return run_backward(Inputs(*arguments[:-1]), (grad_query, grad_key), arguments[-1])

    return DifferentiableOp(name, (_FORWARD, forward), (_BACKWARD, backward), _save, _differentiate)


def define_cached(name: str, run: Callable) -> Any:
    """The op `name`, without gradient: `run(inputs, eps, slots, slot)` writes keys there, gives queries."""

    def forward(*arguments):
        *tensors, eps, slots, slot = arguments
        return run(Inputs(*tensors), eps, slots, slot)

    op = torch.library.custom_op(
        f"realign_kernels::{name}",
        forward,
        mutates_args=("slots",),
        schema=f"({_ARGUMENTS}, Tensor(a!) slots, Tensor slot) -> Tensor",
    )
    op.register_fake(lambda query, *rest: _empty_like(query))
    return op


def allocate(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys, not computed."""
    return _empty_like(query), _empty_like(key)


def allocate_backward(
    grad_query: Tensor, grad_key: Tensor, query: Tensor, key: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, not computed; of the weights an empty one without a norm."""
    _, _, und_query, gen_query, *_ = rest
    num_weights = 0 if und_query is None else 1 if gen_query is None else 2
    shape = (2, num_weights, query.shape[2])
    return (*allocate(query, key), torch.empty(shape, dtype=torch.float32, device=query.device))


def as_rows(heads: Tensor) -> Tensor:
    """[L, H, D] with the heads of a token next to each other: as it is, unless its strides forbid it."""
    _, head_stride, stride = heads.stride()
    return heads if (head_stride, stride) == (heads.shape[2], 1) else heads.contiguous()


def _empty_like(heads: Tensor) -> Tensor:
    return torch.empty_like(heads, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(backward, ctx, grad_query, grad_key):
    inputs = Inputs(*ctx.saved_tensors)
    *grads, grad_weights = backward(grad_query, grad_key, *inputs, ctx.eps)
    weights = (inputs.und_query, inputs.gen_query, inputs.und_key, inputs.gen_key)
    of_weights = [
        None if weight is None else grad_weights[number // 2, number % 2].to(weight.dtype)
        for number, weight in enumerate(weights)
    ]
    return *grads, None, None, *of_weights, None, None, None


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor? und_query, Tensor? gen_query, "
    "Tensor? und_key, Tensor? gen_key, Tensor? expert, Tensor? index, float eps"
)
_FORWARD = Signature(_ARGUMENTS, "(Tensor, Tensor)", allocate)
_BACKWARD = Signature(
    f"Tensor grad_query, Tensor grad_key, {_ARGUMENTS}", "(Tensor, Tensor, Tensor)", allocate_backward
)
