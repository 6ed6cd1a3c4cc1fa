"""Triton path of `mot_norm`. L packed tokens, E width, W experts.

A program takes BL whole rows, or in the backward a run of such tiles; BL follows from the width, so that a
row's bits are its own. The weights' gradients are summed in two stages: over a program's rows, then over
programs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.launch import launch
from realign_kernels.mot_norm import ops

TILE_NUMBERS = 2048
MAX_ROWS = 64  # of a program of the backward
NUM_PROGRAMS = 512  # of the backward, about: each leaves a partial sum


@triton.jit
def load_wide(pointer, offsets, mask):
    """Numbers as float32; 0 where the mask is off."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_expert(p_expert, o_l, m_l):
    """The rows' experts; 0 for all where none are given."""
    if p_expert is not None:
        return tl.load(p_expert + o_l, mask=m_l, other=0)
    else:
        return tl.zeros(o_l.shape, tl.int32)


@triton.jit
def load_weight(p_und, p_gen, b_expert, o_e, mask, dtype: tl.constexpr):
    """Each row's weight, rounded to `dtype`."""
    if p_gen is not None:
        p_weight = tl.where(b_expert == 0, p_und, p_gen)[:, None] + o_e[None, :]
    else:
        p_weight = p_und + tl.zeros(b_expert.shape, tl.int32)[:, None] + o_e[None, :]
    return tl.load(p_weight, mask=mask, other=0.0).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def mot_norm_kernel(
    p_hidden,
    p_residual,
    p_und,
    p_gen,
    p_expert,
    p_normed,
    p_total,
    p_scale,
    num_rows,
    eps,
    E: tl.constexpr,
    BL: tl.constexpr,
    BE: tl.constexpr,
):
    o_l = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    o_e = tl.arange(0, BE)
    m_l = o_l < num_rows
    m_e = o_e < E
    offsets = o_l[:, None] * E + o_e[None, :]
    mask = m_l[:, None] & m_e[None, :]
    dtype: tl.constexpr = p_normed.dtype.element_ty
    b_x = load_wide(p_hidden, offsets, mask)
    if p_residual is not None:
        b_x = (b_x + load_wide(p_residual, offsets, mask)).to(dtype).to(tl.float32)
        tl.store(p_total + offsets, b_x, mask=mask)
    b_scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) * (1.0 / E) + eps))
    tl.store(p_scale + o_l, b_scale, mask=m_l)
    b_weight = load_weight(p_und, p_gen, load_expert(p_expert, o_l, m_l), o_e, mask, dtype)
    b_normed = (b_x * b_scale[:, None]).to(dtype).to(tl.float32)
    tl.store(p_normed + offsets, b_normed * b_weight, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_of_program"])
def mot_norm_backward_kernel(
    p_grad_normed,
    p_grad_total,
    p_x,
    p_scale,
    p_und,
    p_gen,
    p_expert,
    p_grad_x,
    p_partial,
    num_rows,
    rows_of_program,
    E: tl.constexpr,
    BL: tl.constexpr,
    BE: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    b_sum_und = tl.zeros((BL, BE), tl.float32)
    b_sum_gen = tl.zeros((BL, BE), tl.float32)
    for i_l in range(0, rows_of_program, BL):
        o_l = i_p * rows_of_program + i_l + tl.arange(0, BL)
        m_l = o_l < num_rows
        offsets = o_l[:, None] * E + o_e[None, :]
        mask = m_l[:, None] & m_e[None, :]
        b_expert = load_expert(p_expert, o_l, m_l)
        b_weight = load_weight(p_und, p_gen, b_expert, o_e, mask, p_x.dtype.element_ty)
        b_scale = tl.load(p_scale + o_l, mask=m_l, other=0.0)[:, None]
        b_grad = load_wide(p_grad_normed, offsets, mask)
        b_normed = load_wide(p_x, offsets, mask) * b_scale
        b_product = b_grad * b_normed
        if p_gen is not None:
            is_gen = b_expert[:, None] == 1
            b_sum_gen += tl.where(is_gen, b_product, 0.0)
            b_sum_und += tl.where(is_gen, 0.0, b_product)
        else:
            b_sum_und += b_product
        b_along = tl.sum(b_product * b_weight, axis=1)[:, None] * (1.0 / E)
        b_grad_x = (b_grad * b_weight - b_normed * b_along) * b_scale
        if p_grad_total is not None:
            b_grad_x += load_wide(p_grad_total, offsets, mask)
        tl.store(p_grad_x + offsets, b_grad_x, mask=mask)
    if p_gen is not None:
        tl.store(p_partial + i_p * 2 * E + o_e, tl.sum(b_sum_und, axis=0), mask=m_e)
        tl.store(p_partial + (i_p * 2 + 1) * E + o_e, tl.sum(b_sum_gen, axis=0), mask=m_e)
    else:
        tl.store(p_partial + i_p * E + o_e, tl.sum(b_sum_und, axis=0), mask=m_e)


def tile_constants(width: int) -> dict[str, int]:
    """Rows and padded width of a tile, and its warps: a wide load of 16-bit numbers a thread."""
    block = triton.next_power_of_2(max(width, 1))
    rows = max(1, TILE_NUMBERS // block)
    return {"E": width, "BL": rows, "BE": block, "num_warps": min(max(rows * block // 256, 4), 32)}


def rows_of_program(num_rows: int, tile_rows: int) -> int:
    """A power of two: few of few rows, so that the whole chip works; many of many, for few partial sums."""
    rows = triton.next_power_of_2(triton.cdiv(max(num_rows, 1), NUM_PROGRAMS))
    return tile_rows * max(1, min(rows, MAX_ROWS) // tile_rows)


def _run(
    hidden: Tensor,
    residual: Tensor | None,
    und: Tensor,
    gen: Tensor | None,
    expert: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    normed, total, scale = results = ops.allocate(hidden, residual, und, gen, expert, eps)
    constants = tile_constants(hidden.shape[1])
    pointers = contiguous(hidden, residual, *in_one_dtype(und, gen), expert)
    outs = (normed, None if residual is None else total, scale)
    grid = (triton.cdiv(len(hidden), constants["BL"]),)
    launch(mot_norm_kernel, grid, *pointers, *outs, len(hidden), eps, **constants)
    return results


def _run_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    scale: Tensor,
    und: Tensor,
    gen: Tensor | None,
    expert: Tensor | None,
) -> tuple[Tensor, Tensor]:
    weights = in_one_dtype(und, gen)
    given = (grad_normed, grad_total, x, scale, *weights, expert)
    grad_x, grad_weights_WE = ops.allocate_backward(*given)
    constants = tile_constants(x.shape[1])
    rows = rows_of_program(len(x), constants["BL"])
    partial_PWE = grad_weights_WE.new_empty(triton.cdiv(len(x), rows), *grad_weights_WE.shape)
    pointers = contiguous(*given)
    sizes = (len(x), rows)
    launch(mot_norm_backward_kernel, (len(partial_PWE),), *pointers, grad_x, partial_PWE, *sizes, **constants)
    return grad_x, partial_PWE.sum(0)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """What is given of these, without holes."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def in_one_dtype(*weights: Tensor | None) -> list[Tensor | None]:
    """A kernel chooses between the pointers of weights: their types must be one."""
    dtypes = {weight.dtype for weight in weights if weight is not None}
    if len(dtypes) < 2:
        return list(weights)
    return [None if weight is None else weight.float() for weight in weights]


mot_norm_triton = ops.define("mot_norm_triton", _run, _run_backward)
