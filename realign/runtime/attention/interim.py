"""Plain torch in place of the ops `merge_attention` and `decode_attention`."""

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


def decode_attention(
    query_RHD: Tensor, key_RKSD: Tensor, value_RKSD: Tensor, length_R: Tensor
) -> tuple[Tensor, Tensor]:
    """One query a row to the first keys of its slot."""
    num_keys = int(length_R.max())
    key_RKSD, value_RKSD = key_RKSD[:, :, :num_keys], value_RKSD[:, :, :num_keys]
    is_out_RS = torch.arange(num_keys) >= length_R[:, None]
    value_RKSD = value_RKSD.masked_fill(is_out_RS[:, None, :, None], 0)
    query_RKGD = query_RHD.float().unflatten(1, (key_RKSD.shape[1], -1))
    score = torch.einsum("rkgd,rksd->rkgs", query_RKGD, key_RKSD.float()) / query_RHD.shape[-1] ** 0.5
    score = score.masked_fill(is_out_RS[:, None, None], float("-inf"))
    out_RKGD = torch.einsum("rkgs,rksd->rkgd", score.softmax(-1), value_RKSD.float())
    return out_RKGD.flatten(1, 2).to(query_RHD.dtype), score.logsumexp(-1).flatten(1)
