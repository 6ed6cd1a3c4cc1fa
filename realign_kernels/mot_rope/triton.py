"""Triton path of `mot_rope`. L tokens, H query heads, K key heads, D head dim, A = D/2 angles.

A tile is the heads of BL tokens, queries and keys of a token one after the other in BH rows, and either
half of them in BA columns. Its size follows from the heads alone, so that a token's bits are its own. The
weights' gradients are summed in two stages: over the tokens of a program, then over programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.launch import launch
from realign_kernels.mot_norm.triton import contiguous, in_one_dtype
from realign_kernels.mot_rope import ops
from realign_kernels.mot_rope.ops import Inputs

TILE_NUMBERS = 2048  # of either half
PROGRAM_TOKENS = 8  # of the backward, at least


@triton.jit
def token_rows(token, num_tokens, H: tl.constexpr, K: tl.constexpr, BL: tl.constexpr, BH: tl.constexpr):
    """Of each row of a tile: its token, its head, whether it is a query, whether there is such a row."""
    o_r = tl.arange(0, BL * BH)
    o_l = token + o_r // BH
    o_h = o_r % BH
    return o_l, o_h, o_h < H, (o_l < num_tokens) & (o_h < H + K)


@triton.jit
def head_pointers(p_query, p_key, rows, strides, o_h, is_query, H: tl.constexpr, D: tl.constexpr):
    """Pointers [rows, 1] to the first number of each row's head.

    `rows` are queries' and keys'; `strides` those between queries' rows, keys' rows and keys' heads.
    """
    query = p_query + rows[0] * strides[0] + o_h * D
    key = p_key + rows[1] * strides[1] + (o_h - H) * strides[2]
    return tl.where(is_query, query, key)[:, None]


@triton.jit
def weight_pointers(p_und_q, p_gen_q, p_und_k, p_gen_k, b_expert, is_query):
    """Pointers [rows, 1] to each row's norm weight."""
    und = tl.where(is_query, p_und_q, p_und_k)
    if p_gen_q is not None:
        gen = tl.where(is_query, p_gen_q, p_gen_k)
        return tl.where(b_expert == 0, und, gen)[:, None]
    else:
        return und[:, None]


@triton.jit
def load_wide(pointers, mask):
    """Numbers as float32; 0 where the mask is off."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_or(pointer, offsets, mask, default):
    """Numbers of a tensor, or the default where none is given."""
    if pointer is not None:
        return tl.load(pointer + offsets, mask=mask, other=0)
    else:
        return default


@triton.jit
def scale_of(b_first, b_second, eps, A: tl.constexpr):
    """`1 / sqrt(mean(x^2) + eps)` of each row, [rows, 1]."""
    b_squares = tl.sum(b_first * b_first + b_second * b_second, axis=1)
    return tl.div_rn(1.0, tl.sqrt_rn(b_squares * (0.5 / A) + eps))[:, None]


@triton.jit(do_not_specialize=["num_tokens"])
def mot_rope_kernel(
    p_query,
    p_key,
    p_cos,
    p_sin,
    p_und_q,
    p_gen_q,
    p_und_k,
    p_gen_k,
    p_expert,
    p_index,
    p_slot,
    p_query_out,
    p_key_out,
    num_tokens,
    stride_query,
    stride_key,
    stride_out,
    stride_out_head,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    A: tl.constexpr,
    BL: tl.constexpr,
    BH: tl.constexpr,
    BA: tl.constexpr,
):
    o_l, o_h, is_query, m_r = token_rows(tl.program_id(0).to(tl.int64) * BL, num_tokens, H, K, BL, BH)
    o_a = tl.arange(0, BA)[None, :]
    mask = m_r[:, None] & (o_a < A)
    strides = (stride_query, stride_key, 2 * A)
    p_x = head_pointers(p_query, p_key, (o_l, o_l), strides, o_h, is_query, H, 2 * A) + o_a
    b_first = load_wide(p_x, mask)
    b_second = load_wide(p_x + A, mask)
    b_cos = load_wide(p_cos + o_l[:, None] * A + o_a, mask)
    b_sin = load_wide(p_sin + o_l[:, None] * A + o_a, mask)
    if p_und_q is not None:
        b_expert = load_or(p_expert, o_l, m_r, 0)
        p_weight = weight_pointers(p_und_q, p_gen_q, p_und_k, p_gen_k, b_expert, is_query) + o_a
        b_scale = scale_of(b_first, b_second, eps, A)
        b_first = b_first * b_scale * load_wide(p_weight, mask)
        b_second = b_second * b_scale * load_wide(p_weight + A, mask)
    row_q = load_or(p_index, o_l, m_r, o_l)
    row_k = load_or(p_slot, o_l, m_r, row_q)
    strides = (H * 2 * A, stride_out, stride_out_head)
    p_out = head_pointers(p_query_out, p_key_out, (row_q, row_k), strides, o_h, is_query, H, 2 * A) + o_a
    tl.store(p_out, b_first * b_cos - b_second * b_sin, mask=mask)
    tl.store(p_out + A, b_second * b_cos + b_first * b_sin, mask=mask)


@triton.jit
def store_sums(p_partial, b_first, b_second, rows, A: tl.constexpr, BA: tl.constexpr):
    """The sums of the chosen rows, both halves."""
    o_a = tl.arange(0, BA)
    tl.store(p_partial + o_a, tl.sum(tl.where(rows, b_first, 0.0), axis=0), mask=o_a < A)
    tl.store(p_partial + A + o_a, tl.sum(tl.where(rows, b_second, 0.0), axis=0), mask=o_a < A)


@triton.jit(do_not_specialize=["num_tokens"])
def mot_rope_backward_kernel(
    p_grad_query,
    p_grad_key,
    p_query,
    p_key,
    p_cos,
    p_sin,
    p_und_q,
    p_gen_q,
    p_und_k,
    p_gen_k,
    p_expert,
    p_index,
    p_query_out,
    p_key_out,
    p_partial,
    num_tokens,
    stride_query,
    stride_key,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    A: tl.constexpr,
    BL: tl.constexpr,
    BH: tl.constexpr,
    BA: tl.constexpr,
    NT: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    o_a = tl.arange(0, BA)[None, :]
    b_und_first = tl.zeros((BL * BH, BA), tl.float32)
    b_und_second = tl.zeros((BL * BH, BA), tl.float32)
    b_gen_first = tl.zeros((BL * BH, BA), tl.float32)
    b_gen_second = tl.zeros((BL * BH, BA), tl.float32)
    for i_t in range(NT):
        o_l, o_h, is_query, m_r = token_rows((i_p * NT + i_t) * BL, num_tokens, H, K, BL, BH)
        mask = m_r[:, None] & (o_a < A)
        row = load_or(p_index, o_l, m_r, o_l)
        dense = (H * 2 * A, K * 2 * A, 2 * A)
        p_grad = head_pointers(p_grad_query, p_grad_key, (row, row), dense, o_h, is_query, H, 2 * A) + o_a
        b_out_first = load_wide(p_grad, mask)
        b_out_second = load_wide(p_grad + A, mask)
        b_cos = load_wide(p_cos + o_l[:, None] * A + o_a, mask)
        b_sin = load_wide(p_sin + o_l[:, None] * A + o_a, mask)
        b_grad_first = b_out_first * b_cos + b_out_second * b_sin
        b_grad_second = b_out_second * b_cos - b_out_first * b_sin
        if p_und_q is not None:
            strides = (stride_query, stride_key, 2 * A)
            p_x = head_pointers(p_query, p_key, (o_l, o_l), strides, o_h, is_query, H, 2 * A) + o_a
            b_first = load_wide(p_x, mask)
            b_second = load_wide(p_x + A, mask)
            b_scale = scale_of(b_first, b_second, eps, A)
            b_first = b_first * b_scale
            b_second = b_second * b_scale
            b_product_first = b_grad_first * b_first
            b_product_second = b_grad_second * b_second
            b_expert = load_or(p_expert, o_l, m_r, 0)
            if p_gen_q is not None:
                is_gen = (b_expert == 1)[:, None]
                b_gen_first += tl.where(is_gen, b_product_first, 0.0)
                b_gen_second += tl.where(is_gen, b_product_second, 0.0)
                b_und_first += tl.where(is_gen, 0.0, b_product_first)
                b_und_second += tl.where(is_gen, 0.0, b_product_second)
            else:
                b_und_first += b_product_first
                b_und_second += b_product_second
            p_weight = weight_pointers(p_und_q, p_gen_q, p_und_k, p_gen_k, b_expert, is_query) + o_a
            b_weight_first = load_wide(p_weight, mask)
            b_weight_second = load_wide(p_weight + A, mask)
            b_along = tl.sum(b_product_first * b_weight_first + b_product_second * b_weight_second, axis=1)
            b_along = b_along[:, None] * (0.5 / A)
            b_grad_first = (b_grad_first * b_weight_first - b_first * b_along) * b_scale
            b_grad_second = (b_grad_second * b_weight_second - b_second * b_along) * b_scale
        p_out = head_pointers(p_query_out, p_key_out, (o_l, o_l), dense, o_h, is_query, H, 2 * A) + o_a
        tl.store(p_out, b_grad_first, mask=mask)
        tl.store(p_out + A, b_grad_second, mask=mask)
    if p_und_q is not None:
        o_h = tl.arange(0, BL * BH)[:, None] % BH
        W: tl.constexpr = 1 if p_gen_q is None else 2
        p_partial += i_p * 4 * W * A
        store_sums(p_partial, b_und_first, b_und_second, o_h < H, A, BA)
        store_sums(p_partial + 2 * W * A, b_und_first, b_und_second, o_h >= H, A, BA)
        if p_gen_q is not None:
            store_sums(p_partial + 2 * A, b_gen_first, b_gen_second, o_h < H, A, BA)
            store_sums(p_partial + 2 * W * A + 2 * A, b_gen_first, b_gen_second, o_h >= H, A, BA)


def tile_constants(query: Tensor, key: Tensor) -> dict[str, int]:
    """Heads, angles, the tile's tokens, padded sizes and warps: a wide load of 16-bit numbers a thread."""
    (_, heads, dim), key_heads = query.shape, key.shape[1]
    block_heads, block_angles = (
        triton.next_power_of_2(max(heads + key_heads, 1)),
        triton.next_power_of_2(dim // 2),
    )
    tokens = max(1, TILE_NUMBERS // (block_heads * block_angles))
    num_warps = min(max(tokens * block_heads * block_angles // 256, 4), 32)
    sizes = {"H": heads, "K": key_heads, "A": dim // 2}
    return {**sizes, "BL": tokens, "BH": block_heads, "BA": block_angles, "num_warps": num_warps}


def _launch(inputs: Inputs, slot: Tensor | None, outs: tuple[Tensor, Tensor], eps: float) -> None:
    constants = tile_constants(inputs.query, inputs.key)
    inputs = _align(inputs)
    pointers = (*inputs[:2], *contiguous(*inputs[2:], slot))
    numbers = (len(inputs.query), *_strides(inputs), *outs[1].stride()[:2], eps)
    grid = (triton.cdiv(len(inputs.query), constants["BL"]),)
    launch(mot_rope_kernel, grid, *pointers, *outs, *numbers, **constants)


def _align(inputs: Inputs) -> Inputs:
    heads = map(ops.as_rows, inputs[:2])
    return Inputs(*heads, *inputs[2:4], *in_one_dtype(*inputs[4:8]), *inputs[8:])


def _strides(inputs: Inputs) -> tuple[int, int]:
    return inputs.query.stride(0), inputs.key.stride(0)


def _run(inputs: Inputs, eps: float) -> tuple[Tensor, Tensor]:
    outs = ops.allocate(inputs.query, inputs.key)
    _launch(inputs, None, outs, eps)
    return outs


def _run_cached(inputs: Inputs, eps: float, slots: Tensor, slot: Tensor) -> Tensor:
    query, _ = ops.allocate(inputs.query, inputs.key)
    _launch(inputs, slot, (query, slots), eps)
    return query


def _run_backward(inputs: Inputs, grads: tuple[Tensor, Tensor], eps: float) -> tuple[Tensor, ...]:
    query, key, weights = ops.allocate_backward(*grads, *inputs, eps)
    constants = tile_constants(inputs.query, inputs.key)
    num_tiles = max(1, PROGRAM_TOKENS // constants["BL"])
    grid = (triton.cdiv(len(inputs.query), constants["BL"] * num_tiles),)
    partial = weights.new_empty(*grid, *weights.shape)
    inputs = _align(inputs)
    pointers = (*contiguous(*grads), *inputs[:2], *contiguous(*inputs[2:]))
    outs, numbers = (query, key, partial), (len(inputs.query), *_strides(inputs), eps)
    launch(mot_rope_backward_kernel, grid, *pointers, *outs, *numbers, **constants, NT=num_tiles)
    return query, key, partial.sum(0)


mot_rope_triton = ops.define("mot_rope_triton", _run, _run_backward)
mot_rope_cached_triton = ops.define_cached("mot_rope_cached_triton", _run_cached)
