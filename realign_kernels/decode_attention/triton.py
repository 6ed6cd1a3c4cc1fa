"""Triton path of `decode_attention`. R rows, H query heads, K key heads, G = H / K, S tokens, D head dim.

A program takes a chunk of tokens of a key head of a row, and all its query heads: one product of matrices
scores them. A second pass adds up the chunks of a row. So few rows keep a chip busy. Lengths are read on the
device alone: a graph of launches can be replayed while they grow. Chunks, and the blocks in them, are cut
from a row's first token on: the order of sums follows from its own length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.decode_attention import ops
from realign_kernels.launch import launch

CHUNK = 256  # tokens of a program: its sums, in float32, are a few percent of what it reads
BLOCK_NUMBERS = 8192  # of a block of keys,
MAX_BLOCK = 64  # and its tokens: more of short heads do not fit the registers
MIN_SIDE = 16  # of the matrices of a product


@triton.jit
def load_tokens(p_first, o_s, length, stride, D: tl.constexpr, BD: tl.constexpr):
    """Numbers [tokens, BD] of a block of keys or values; 0 behind the last token."""
    o_d = tl.arange(0, BD)
    mask = (o_s < length)[:, None] & (o_d < D)[None, :]
    return tl.load(p_first + o_s.to(tl.int64)[:, None] * stride + o_d[None, :], mask=mask, other=0.0)


@triton.jit
def multiply(b_weight, b_value):
    """Products of float32 weights and values of any type, as good as in float32.

    Tensor cores multiply 16-bit numbers exactly: a weight is the sum of two of them, to 16 bits or more.
    """
    if b_value.dtype == tl.float32:
        return tl.dot(b_weight, b_value, input_precision="ieee")
    else:
        b_high = b_weight.to(b_value.dtype)
        b_low = (b_weight - b_high.to(tl.float32)).to(b_value.dtype)
        return tl.dot(b_high, b_value) + tl.dot(b_low, b_value)


@triton.jit
def attend_chunk(
    b_query,
    p_key,
    p_value,
    start,
    end,
    stride_key,
    stride_value,
    scale,
    D: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    """Of tokens start to end: the highest score, the sum of the weights, and that of the weighed values."""
    b_max = tl.full((BG,), float("-inf"), tl.float32)
    b_total = tl.zeros((BG,), tl.float32)
    b_acc = tl.zeros((BG, BD), tl.float32)
    for i_s in range(start, end, BS):
        o_s = i_s + tl.arange(0, BS)
        b_key = load_tokens(p_key, o_s, end, stride_key, D, BD)
        b_value = load_tokens(p_value, o_s, end, stride_value, D, BD)
        b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee") * scale
        b_score = tl.where((o_s < end)[None, :], b_score, float("-inf"))
        b_highest = tl.maximum(b_max, tl.max(b_score, axis=1))
        b_factor = tl.exp(b_max - b_highest)
        b_weight = tl.exp(b_score - b_highest[:, None])
        b_total = b_total * b_factor + tl.sum(b_weight, axis=1)
        b_acc = b_acc * b_factor[:, None] + multiply(b_weight, b_value)
        b_max = b_highest
    return b_max, b_total, b_acc


@triton.jit(do_not_specialize=["num_tokens"])
def decode_attention_kernel(
    p_query,
    p_key,
    p_value,
    p_length,
    p_max,
    p_total,
    p_acc,
    num_tokens,
    stride_query_row,
    stride_query_head,
    stride_key_row,
    stride_key_head,
    stride_key,
    stride_value_row,
    stride_value_head,
    stride_value,
    scale,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    i_k = tl.program_id(1).to(tl.int64)
    start = tl.program_id(2) * BC
    length = tl.minimum(tl.load(p_length + i_r), num_tokens).to(tl.int32)
    if start < length:
        o_g = tl.arange(0, BG)
        o_d = tl.arange(0, BD)
        m_gd = (o_g < G)[:, None] & (o_d < D)[None, :]
        p_query += i_r * stride_query_row + i_k * G * stride_query_head
        b_query = tl.load(p_query + o_g[:, None] * stride_query_head + o_d[None, :], mask=m_gd, other=0.0)
        p_key += i_r * stride_key_row + i_k * stride_key_head
        p_value += i_r * stride_value_row + i_k * stride_value_head
        end = tl.minimum(start + BC, length)
        b_max, b_total, b_acc = attend_chunk(
            b_query, p_key, p_value, start, end, stride_key, stride_value, scale, D, BG, BS, BD
        )
        o_r = ((i_r * K + i_k) * tl.num_programs(2) + tl.program_id(2)) * G + o_g
        tl.store(p_max + o_r, b_max, mask=o_g < G)
        tl.store(p_total + o_r, b_total, mask=o_g < G)
        tl.store(p_acc + o_r[:, None] * D + o_d[None, :], b_acc, mask=m_gd)


@triton.jit(do_not_specialize=["num_tokens", "num_chunks"])
def decode_attention_sum_kernel(
    p_length,
    p_max,
    p_total,
    p_acc,
    p_out,
    p_lse,
    num_tokens,
    num_chunks,
    G: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1)
    i_rh = i_r * tl.num_programs(1) + i_h
    o_d = tl.arange(0, BD)
    # A chunk has the heads of a key head side by side.
    first = (i_r * (tl.num_programs(1) // G) + i_h // G) * num_chunks * G + i_h % G
    count = tl.cdiv(tl.minimum(tl.load(p_length + i_r), num_tokens).to(tl.int32), BC)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    b_acc = tl.zeros((BD,), tl.float32)
    for i_n in range(0, count, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < count
        o_c = first + o_n * G
        b_max = tl.load(p_max + o_c, mask=m_n, other=float("-inf"))
        b_total = tl.load(p_total + o_c, mask=m_n, other=0.0)
        m_nd = m_n[:, None] & (o_d < D)[None, :]
        b_next_acc = tl.load(p_acc + o_c[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)
        next_highest = tl.maximum(highest, tl.max(b_max, axis=0))
        factor = tl.exp(highest - next_highest)
        b_weight = tl.exp(b_max - next_highest)
        total = total * factor + tl.sum(b_total * b_weight, axis=0)
        b_acc = b_acc * factor + tl.sum(b_next_acc * b_weight[:, None], axis=0)
        highest = next_highest
    divisor = tl.where(total > 0, total, 1.0)  # 0 and -inf where there was no token
    tl.store(p_out + i_rh * D + o_d, tl.div_rn(b_acc, divisor + tl.zeros_like(b_acc)), mask=o_d < D)
    tl.store(p_lse + i_rh, highest + tl.log(divisor))


def _run(query: Tensor, key: Tensor, value: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    query, length = ops.in_place(query), length.contiguous()
    out, lse = results = ops.allocate(query)
    num_rows, key_heads, num_tokens, dim = key.shape
    num_groups, num_chunks = query.shape[1] // key_heads, triton.cdiv(num_tokens, CHUNK)
    # Tiles follow from the heads alone.
    block_dim = max(triton.next_power_of_2(dim), MIN_SIDE)
    constants = {"G": num_groups, "D": dim, "BD": block_dim, "BC": CHUNK}
    shape = (num_rows, key_heads, num_chunks, num_groups)
    highest, total = (torch.empty(shape, dtype=torch.float32, device=query.device) for _ in range(2))
    acc = torch.empty((*shape, dim), dtype=torch.float32, device=query.device)
    strides = (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3])
    launch(
        decode_attention_kernel,
        shape[:3],
        *(query, key, value, length, highest, total, acc),
        *(num_tokens, *strides, dim**-0.5),
        K=key_heads,
        BG=max(triton.next_power_of_2(num_groups), MIN_SIDE),
        BS=min(max(BLOCK_NUMBERS // block_dim, MIN_SIDE), MAX_BLOCK),
        **constants,
    )
    chunks = (length, highest, total, acc)
    grid = (num_rows, query.shape[1])
    launch(decode_attention_sum_kernel, grid, *chunks, out, lse, num_tokens, num_chunks, BN=16, **constants)
    return results


decode_attention_triton = torch.library.custom_op(
    "realign_kernels::decode_attention_triton",
    _run,
    mutates_args=(),
    schema=f"({ops.ARGUMENTS}) -> {ops.RESULTS}",
)
decode_attention_triton.register_fake(lambda query, key, value, length: ops.allocate(query))
