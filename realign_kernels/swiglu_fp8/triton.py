"""Triton path of `swiglu_fp8`. L rows, E numbers of a row; tiles as of `swiglu`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.launch import launch
from realign_kernels.quantize_fp8.triton import e4m3_bits
from realign_kernels.swiglu.triton import MAX_COLUMNS, TILE_NUMBERS, find_halves, load_tile, tile_of


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_fp8_kernel(
    p_gate, p_up, p_out, num_rows, width, stride, inverse, BL: tl.constexpr, BE: tl.constexpr
):
    o_l, o_e, mask = tile_of(num_rows, width, BL, BE)
    dtype: tl.constexpr = p_gate.dtype.element_ty
    b_gate = load_tile(p_gate, o_l * stride + o_e, mask)
    b_up = load_tile(p_up, o_l * stride + o_e, mask)
    b_silu = (b_gate / (1.0 + tl.exp(-b_gate))).to(dtype).to(tl.float32)
    b_out = (b_silu * b_up).to(dtype).to(tl.float32)
    tl.store(p_out + o_l * width + o_e, e4m3_bits(b_out * inverse), mask=mask)


@torch.library.custom_op(
    "realign_kernels::swiglu_fp8_triton", mutates_args=(), schema="(Tensor gate_up, float scale) -> Tensor"
)
def swiglu_fp8_triton(gate_up: Tensor, scale: float) -> Tensor:
    gate, up = find_halves(gate_up, None)
    num_rows, width = gate.shape
    out = torch.empty(num_rows, width, dtype=torch.uint8, device=gate.device)
    columns = min(MAX_COLUMNS, triton.next_power_of_2(max(width, 1)))
    rows = TILE_NUMBERS // columns
    grid = (triton.cdiv(num_rows, rows) * triton.cdiv(width, columns),)
    arguments = (gate, up, out, num_rows, width, gate.stride(0), 1 / scale)
    launch(swiglu_fp8_kernel, grid, *arguments, BL=rows, BE=columns)
    return out.view(torch.float8_e4m3fn)


@swiglu_fp8_triton.register_fake
def _(gate_up, scale):
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    return torch.empty(shape, dtype=torch.float8_e4m3fn, device=gate_up.device)
