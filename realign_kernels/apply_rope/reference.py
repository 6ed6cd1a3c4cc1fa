"""Definition of `apply_rope` in plain torch. L packed tokens, H heads, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rope_reference(x_LHD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Rotate the pair (i, i + D/2) of each head by the angle of its token, in float32 or wider."""
    wide = torch.promote_types(x_LHD.dtype, torch.float32)
    x_wide_LHD = x_LHD.to(wide)
    first, second = x_wide_LHD.chunk(2, dim=-1)
    turned_LHD = torch.cat((-second, first), dim=-1)
    cos_L1D, sin_L1D = cos_LD.to(wide).unsqueeze(1), sin_LD.to(wide).unsqueeze(1)
    return (x_wide_LHD * cos_L1D + turned_LHD * sin_L1D).to(x_LHD.dtype)
