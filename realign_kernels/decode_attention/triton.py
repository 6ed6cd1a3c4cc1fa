"""Triton path of `decode_attention`. R rows, H query heads, K key heads, G = H / K, S tokens, D head dim.

A program is a key head of a row with all its query heads, which one product of matrices scores. Lengths are
read on the device alone, so that a graph of launches can be replayed while they grow. Tokens are cut into
chunks, and those into blocks, from a row's first token on: the order of sums follows from its own length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.decode_attention import ops
from realign_kernels.launch import launch

CHUNK = 256  # tokens whose sums a second pass adds up, where chunks run apart
BLOCK_NUMBERS = 8192  # of a block of keys
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


@triton.jit
def add_chunk(b_max, b_total, b_acc, b_next_max, b_next_total, b_next_acc):
    """The sums of the chunks so far, and of the next, which has a token: its highest score is a number."""
    b_highest = tl.maximum(b_max, b_next_max)
    b_factor = tl.exp(b_max - b_highest)
    b_next_factor = tl.exp(b_next_max - b_highest)
    b_total = b_total * b_factor + b_next_total * b_next_factor
    b_acc = b_acc * b_factor[:, None] + b_next_acc * b_next_factor[:, None]
    return b_highest, b_total, b_acc


@triton.jit
def store_rows(p_out, p_lse, i_first, b_max, b_total, b_acc, G: tl.constexpr, D: tl.constexpr):
    """Attended values and log-sum-exps of G heads from `i_first` on; 0 and -inf where there was no token."""
    o_g = tl.arange(0, b_acc.shape[0])
    o_d = tl.arange(0, b_acc.shape[1])
    b_total_or_one = tl.where(b_total > 0, b_total, 1.0)
    b_out = tl.div_rn(b_acc, b_total_or_one[:, None] + tl.zeros_like(b_acc))
    mask = (o_g < G)[:, None] & (o_d < D)[None, :]
    tl.store(p_out + (i_first + o_g)[:, None] * D + o_d[None, :], b_out, mask=mask)
    tl.store(p_lse + i_first + o_g, b_max + tl.log(b_total_or_one), mask=o_g < G)


@triton.jit(do_not_specialize=["num_tokens"])
def decode_attention_kernel(
    p_query,
    p_key,
    p_value,
    p_length,
    p_out,
    p_lse,
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
    o_g = tl.arange(0, BG)
    o_d = tl.arange(0, BD)
    length = tl.minimum(tl.load(p_length + i_r), num_tokens).to(tl.int32)
    p_query += i_r * stride_query_row + i_k * G * stride_query_head
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    b_query = tl.load(p_query + o_g[:, None] * stride_query_head + o_d[None, :], mask=m_q, other=0.0)
    p_key += i_r * stride_key_row + i_k * stride_key_head
    p_value += i_r * stride_value_row + i_k * stride_value_head
    b_max = tl.full((BG,), float("-inf"), tl.float32)
    b_total = tl.zeros((BG,), tl.float32)
    b_acc = tl.zeros((BG, BD), tl.float32)
    for start in range(0, length, BC):
        end = tl.minimum(start + BC, length)
        b_next_max, b_next_total, b_next_acc = attend_chunk(
            b_query, p_key, p_value, start, end, stride_key, stride_value, scale, D, BG, BS, BD
        )
        b_max, b_total, b_acc = add_chunk(b_max, b_total, b_acc, b_next_max, b_next_total, b_next_acc)
    store_rows(p_out, p_lse, (i_r * K + i_k) * G, b_max, b_total, b_acc, G, D)


def tile_constants(query: Tensor, key: Tensor) -> dict[str, int]:
    """Heads, their dim, and the sizes of blocks: these follow from the heads alone."""
    (_, num_heads, dim), key_heads = query.shape, key.shape[1]
    block_dim = max(triton.next_power_of_2(dim), MIN_SIDE)
    return {
        "K": key_heads,
        "G": num_heads // key_heads,
        "D": dim,
        "BG": max(triton.next_power_of_2(num_heads // key_heads), MIN_SIDE),
        "BS": min(max(BLOCK_NUMBERS // block_dim, MIN_SIDE), 128),
        "BD": block_dim,
        "BC": CHUNK,
    }


def _run(query: Tensor, key: Tensor, value: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    query = ops.in_place(query)
    out, lse = ops.allocate(query)
    numbers = (
        key.shape[2],
        *query.stride()[:2],
        *key.stride()[:3],
        *value.stride()[:3],
        query.shape[2] ** -0.5,
    )
    launch(
        decode_attention_kernel,
        (len(query), key.shape[1]),
        *(query, key, value, length.contiguous(), out, lse),
        *numbers,
        **tile_constants(query, key),
    )
    return out, lse


decode_attention_triton = torch.library.custom_op(
    "realign_kernels::decode_attention_triton",
    _run,
    mutates_args=(),
    schema=f"({ops.ARGUMENTS}) -> {ops.RESULTS}",
)
decode_attention_triton.register_fake(lambda query, key, value, length: ops.allocate(query))
