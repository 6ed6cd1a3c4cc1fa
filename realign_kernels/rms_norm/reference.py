"""Definition of `rms_norm` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in float32 (float64 stays float64), return to `x.dtype`, then weigh."""
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = x_wide.square().mean(dim=-1, keepdim=True)
    normed = (x_wide * torch.rsqrt(mean_square + eps)).to(x.dtype)
    return normed * weight.to(x.dtype)
