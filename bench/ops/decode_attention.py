"""decode_attention: one new token per row, in slots that are three quarters full on the average.

R rows, H query heads, K key-value heads, S tokens of a slot, D head dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import PLAIN, Case, Op, Shape, allow_error, count_bytes, list_impls, randn
from realign_kernels import decode_attention

MINI, BAGEL = {"H": 4, "K": 2, "D": 32}, {"H": 28, "K": 4, "D": 128}
SHAPES = [
    Shape({"R": num_rows, "S": num_tokens} | heads, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for num_rows, num_tokens, heads in ((32, 128, MINI), (32, 400, MINI), (4, 512, BAGEL))
]
GPU_SHAPES = [
    Shape({"R": num_rows, "S": num_tokens} | BAGEL, torch.bfloat16)
    for num_rows, num_tokens in ((64, 2048), (256, 1024), (8, 8192))
]


def plain_decode_attention(
    query_RHD: Tensor, key_RKSD: Tensor, value_RKSD: Tensor, mask_R11S: Tensor
) -> Tensor:
    """Torch's fused attention to whole slots behind a mask, the query heads of a key head as its queries."""
    num_rows, num_heads, dim = query_RHD.shape
    query_RKGD = query_RHD.view(num_rows, key_RKSD.shape[1], -1, dim)
    out_RKGD = F.scaled_dot_product_attention(query_RKGD, key_RKSD, value_RKSD, attn_mask=mask_R11S)
    return out_RKGD.reshape(num_rows, num_heads, dim)


def build(shape: Shape, device: torch.device) -> Case:
    """Attended values; ours find the log-sum-exps too, which plain torch does not give."""
    query_RHD = randn(shape, device, "R", "H", "D")
    key_RKSD, value_RKSD = (randn(shape, device, "R", "K", "S", "D", seed=seed) for seed in (1, 2))
    num_rows, num_tokens = shape.sizes["R"], shape.sizes["S"]
    length_R = torch.linspace(num_tokens // 2, num_tokens, num_rows, device=device).long()
    is_hidden_RS = torch.arange(num_tokens, device=device) >= length_R[:, None]
    mask_R11S = torch.zeros(num_rows, 1, 1, num_tokens, dtype=shape.dtype, device=device)
    mask_R11S.masked_fill_(is_hidden_RS[:, None, None], -math.inf)
    inputs = (query_RHD, key_RKSD, value_RKSD)
    runs = {PLAIN: lambda: plain_decode_attention(*inputs, mask_R11S)}
    for impl in list_impls(["cpp", "triton"], device):
        runs[impl] = lambda impl=impl: decode_attention(*inputs, length_R, impl=impl)[0]
    # What is read of the slots on the average, the queries, and the results.
    num_bytes = count_bytes(key_RKSD, value_RKSD) * 3 // 4 + 2 * count_bytes(query_RHD, length_R)
    num_flops = 3 * query_RHD.numel() * num_tokens
    return Case(runs, num_bytes, allow_error(shape), num_flops)


OPS = {"decode_attention": Op(build, SHAPES, GPU_SHAPES)}
