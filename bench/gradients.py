"""A forward and a backward pass as one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiate(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of `inputs`, which are given to `function` one by one, for `grads` of its results."""
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        results = function(*leaves)
        return torch.autograd.grad(results, leaves, grads[:1] if isinstance(results, Tensor) else grads)
