"""Triton path of `merge_attention`. L tokens, H heads, D head dim; a tile is BR heads of any tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.launch import launch
from realign_kernels.merge_attention import ops

TILE_NUMBERS = 2048


@triton.jit
def load_heads(p_out, o_l, o_h, mask, stride, stride_head, BD: tl.constexpr):
    """Numbers [BR, BD] of heads as float32."""
    o_r = o_l * stride + o_h * stride_head
    return tl.load(p_out + o_r[:, None] + tl.arange(0, BD)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def merge_attention_kernel(
    p_out_a,
    p_lse_a,
    p_out_b,
    p_lse_b,
    p_out,
    p_lse,
    num_rows,
    stride_out_a,
    stride_out_a_head,
    stride_lse_a,
    stride_lse_a_head,
    stride_out_b,
    stride_out_b_head,
    stride_lse_b,
    stride_lse_b_head,
    H: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64) * BR
    o_r = i_r + tl.arange(0, BR)
    m_r = o_r < num_rows
    # Divided in 64 bits once: the rows of a tile are few.
    o_from = (i_r % H).to(tl.int32) + tl.arange(0, BR)
    o_l = i_r // H + o_from // H
    o_h = o_from % H
    mask = m_r[:, None] & (tl.arange(0, BD) < D)[None, :]
    lse_a = tl.load(p_lse_a + o_l * stride_lse_a + o_h * stride_lse_a_head, mask=m_r, other=0.0)
    lse_b = tl.load(p_lse_b + o_l * stride_lse_b + o_h * stride_lse_b_head, mask=m_r, other=0.0)
    b_a = load_heads(p_out_a, o_l, o_h, mask, stride_out_a, stride_out_a_head, BD)
    b_b = load_heads(p_out_b, o_l, o_h, mask, stride_out_b, stride_out_b_head, BD)
    is_a = lse_a > lse_b
    highest = tl.where(is_a, lse_a, lse_b)
    lowest = tl.where(is_a, lse_b, lse_a)
    is_empty = highest == float("-inf")
    ratio = tl.where(is_empty, 0.0, tl.exp(lowest - highest))  # of the lesser weight to the greater
    most = tl.where(is_empty, 0.0, tl.div_rn(1.0, 1.0 + ratio))
    weight_a = tl.where(is_a, most, ratio * most)[:, None]
    weight_b = tl.where(is_a, ratio * most, most)[:, None]
    # A side that weighs 0 is not looked at: it may hold anything.
    b_out = tl.where(weight_a == 0, 0.0, b_a * weight_a)
    b_both = tl.where(weight_a == 0, b_b * weight_b, b_out + b_b * weight_b)
    b_out = tl.where(weight_b == 0, b_out, b_both)
    tl.store(p_out + o_r[:, None] * D + tl.arange(0, BD)[None, :], b_out, mask=mask)
    tl.store(p_lse + o_r, highest + tl.log(1.0 + ratio), mask=m_r)


def _run(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = ops.allocate(out_a)
    num_tokens, num_heads, dim = out_a.shape
    block_dim = triton.next_power_of_2(max(dim, 1))
    block_rows = max(1, TILE_NUMBERS // block_dim)
    strides = (*out_a.stride()[:2], *lse_a.stride(), *out_b.stride()[:2], *lse_b.stride())
    launch(
        merge_attention_kernel,
        (triton.cdiv(num_tokens * num_heads, block_rows),),
        *(out_a, lse_a, out_b, lse_b, out, lse),
        *(num_tokens * num_heads, *strides),
        H=num_heads,
        D=dim,
        BR=block_rows,
        BD=block_dim,
    )
    return out, lse


merge_attention_triton = torch.library.custom_op(
    "realign_kernels::merge_attention_triton",
    _run,
    mutates_args=(),
    schema=f"({ops.ARGUMENTS}) -> {ops.RESULTS}",
)
merge_attention_triton.register_fake(lambda out_a, lse_a, out_b, lse_b: ops.allocate(out_a))
