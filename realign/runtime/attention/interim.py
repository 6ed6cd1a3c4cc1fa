"""Plain torch in place of the op `merge_attention`."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(
    out_a_LHD: Tensor, lse_a_LH: Tensor, out_b_LHD: Tensor, lse_b_LH: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to two disjoint sets of keys, from that to each."""
    lse_LH = torch.logaddexp(lse_a_LH, lse_b_LH)
    weight_a, weight_b = ((lse - lse_LH).exp()[..., None] for lse in (lse_a_LH, lse_b_LH))
    out_LHD = out_a_LHD.float() * weight_a + out_b_LHD.float() * weight_b
    return out_LHD.to(out_a_LHD.dtype), lse_LH
