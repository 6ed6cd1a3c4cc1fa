"""Definition of `decode_attention` in plain torch.

R rows, H query heads, K key-value heads, G = H / K, S tokens of a slot, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention_reference(
    query_RHD: Tensor, key_RKSD: Tensor, value_RKSD: Tensor, length_R: Tensor
) -> tuple[Tensor, Tensor]:
    """`softmax(q k / sqrt(D)) v` and the log-sum-exp of the scores, in float32 or wider, row after row."""
    wide = torch.promote_types(query_RHD.dtype, torch.float32)
    out_RHD = torch.zeros(query_RHD.shape, dtype=query_RHD.dtype, device=query_RHD.device)
    lse_RH = torch.full(query_RHD.shape[:2], float("-inf"), dtype=wide, device=query_RHD.device)
    for row, length in enumerate(length_R.tolist()):
        if length > 0 and query_RHD.shape[1]:
            key_KSD, value_KSD = (tensor[row, :, :length].to(wide) for tensor in (key_RKSD, value_RKSD))
            query_KGD = query_RHD[row].to(wide).contiguous().unflatten(0, (len(key_KSD), -1))
            score_KGS = (query_KGD[:, :, None] * key_KSD[:, None]).sum(-1) * query_RHD.shape[2] ** -0.5
            out_KGD = (score_KGS.softmax(-1)[..., None] * value_KSD[:, None]).sum(-2)
            out_RHD[row] = out_KGD.flatten(0, 1).to(query_RHD.dtype)
            lse_RH[row] = score_KGS.logsumexp(-1).flatten()
    return out_RHD, lse_RH
