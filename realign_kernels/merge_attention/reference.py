"""Definition of `merge_attention` in plain torch. L tokens, H heads, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention_reference(
    out_a_LHD: Tensor, lse_a_LH: Tensor, out_b_LHD: Tensor, lse_b_LH: Tensor
) -> tuple[Tensor, Tensor]:
    """`out_a exp(lse_a - lse) + out_b exp(lse_b - lse)`, `lse = log(exp(lse_a) + exp(lse_b))`.

    In float32 or wider. Weights follow from the difference of the two log-sum-exps: that is more exact than
    their differences from the result. A side that weighs 0 is not looked at.
    """
    highest_LH = torch.maximum(lse_a_LH, lse_b_LH)
    is_empty_LH = highest_LH == float("-inf")
    ratio_LH = (lse_a_LH - lse_b_LH).abs().neg().exp()  # of the lesser weight to the greater
    most_LH, least_LH = 1 / (1 + ratio_LH), ratio_LH / (1 + ratio_LH)
    is_a_LH = lse_a_LH > lse_b_LH
    weight_a_LH1 = torch.where(is_a_LH, most_LH, least_LH)[..., None]
    weight_b_LH1 = torch.where(is_a_LH, least_LH, most_LH)[..., None]
    a_LHD, b_LHD = out_a_LHD.to(lse_a_LH.dtype) * weight_a_LH1, out_b_LHD.to(lse_a_LH.dtype) * weight_b_LH1
    out_LHD = torch.where(weight_a_LH1 == 0, b_LHD, torch.where(weight_b_LH1 == 0, a_LHD, a_LHD + b_LHD))
    out_LHD = out_LHD.masked_fill(is_empty_LH[..., None], 0).to(out_a_LHD.dtype)
    return out_LHD, torch.where(is_empty_LH, highest_LH, highest_LH + ratio_LH.log1p()).contiguous()
