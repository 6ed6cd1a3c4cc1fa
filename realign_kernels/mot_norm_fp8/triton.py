"""Triton path of `mot_norm_fp8`. L packed tokens, E width; tiles as of `mot_norm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.launch import launch
from realign_kernels.mot_norm.triton import contiguous, in_one_dtype, load_weight, load_wide, tile_constants
from realign_kernels.quantize_fp8.triton import e4m3_bits


@triton.jit(do_not_specialize=["num_rows", "num_und"])
def mot_norm_fp8_kernel(
    p_hidden,
    p_residual,
    p_und,
    p_gen,
    p_normed,
    p_quantized,
    p_total,
    num_rows,
    num_und,
    inverse,
    eps,
    E: tl.constexpr,
    BL: tl.constexpr,
    BE: tl.constexpr,
):
    o_l = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    o_e = tl.arange(0, BE)
    is_gen = o_l >= num_und
    offsets = o_l[:, None] * E + o_e[None, :]
    mask = (o_l < num_rows)[:, None] & (o_e < E)[None, :]
    dtype: tl.constexpr = p_normed.dtype.element_ty
    b_x = load_wide(p_hidden, offsets, mask)
    if p_residual is not None:
        b_x = (b_x + load_wide(p_residual, offsets, mask)).to(dtype).to(tl.float32)
        tl.store(p_total + offsets, b_x, mask=mask)
    b_scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) * (1.0 / E) + eps))
    b_weight = load_weight(p_und, p_gen, is_gen.to(tl.int32), o_e, mask, dtype)
    b_normed = (b_x * b_scale[:, None]).to(dtype).to(tl.float32)
    b_out = (b_normed * b_weight).to(dtype)
    tl.store(p_normed + offsets, b_out, mask=mask & (o_l < num_und)[:, None])
    b_code = e4m3_bits(b_out.to(tl.float32) * inverse)
    tl.store(p_quantized + offsets - num_und.to(tl.int64) * E, b_code, mask=mask & is_gen[:, None])


@torch.library.custom_op(
    "realign_kernels::mot_norm_fp8_triton",
    mutates_args=(),
    schema="(Tensor hidden, Tensor? residual, Tensor und, Tensor gen, SymInt num_und, float scale, float eps)"
    " -> (Tensor, Tensor, Tensor)",
)
def mot_norm_fp8_triton(
    hidden: Tensor,
    residual: Tensor | None,
    und: Tensor,
    gen: Tensor,
    num_und: int,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed, quantised, and the sum; the last is empty without a residual."""
    num_rows, width = hidden.shape
    normed = hidden.new_empty(num_und, width)
    quantized = torch.empty(num_rows - num_und, width, dtype=torch.uint8, device=hidden.device)
    total = hidden.new_empty((0, 0) if residual is None else hidden.shape)
    constants = tile_constants(width)
    pointers = (*contiguous(hidden, residual, *in_one_dtype(und, gen)), normed, quantized, total)
    grid = (triton.cdiv(num_rows, constants["BL"]),)
    launch(mot_norm_fp8_kernel, grid, *pointers, num_rows, num_und, 1 / scale, eps, **constants)
    return normed, quantized.view(torch.float8_e4m3fn), total


@mot_norm_fp8_triton.register_fake
def _(hidden, residual, und, gen, num_und, scale, eps):
    width = hidden.shape[1]
    quantized = torch.empty(hidden.shape[0] - num_und, width, dtype=torch.float8_e4m3fn, device=hidden.device)
    total = hidden.new_empty((0, 0) if residual is None else hidden.shape)
    return hidden.new_empty(num_und, width), quantized, total
