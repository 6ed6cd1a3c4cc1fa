"""Definition of `mot_norm` in plain torch. L packed tokens, E width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mot_norm_reference(
    hidden_LE: Tensor,
    weights: Sequence[Tensor],
    eps: float,
    expert_L: Tensor | None,
    residual_LE: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add, normalise in float32 or wider, return to the dtype, then weigh."""
    total_LE = hidden_LE if residual_LE is None else hidden_LE + residual_LE
    normed_LE = norm_rows(total_LE, weights, eps, expert_L, total_LE.dtype)
    return normed_LE if residual_LE is None else (normed_LE, total_LE)


def norm_rows(
    x: Tensor, weights: Sequence[Tensor], eps: float, expert_L: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension of `x` [L, ..., E].

    The quotient, in float32 (float64 for float64), and the weight are rounded to `dtype`, that of the result,
    before they are multiplied.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    normed = (wide * torch.rsqrt(mean_square + eps)).to(dtype)
    if expert_L is None or len(weights) == 1:
        return normed * weights[0].to(dtype)
    is_und = (expert_L == 0).view(-1, *(1,) * (x.dim() - 1))
    return normed * torch.where(is_und, weights[0].to(dtype), weights[1].to(dtype))
