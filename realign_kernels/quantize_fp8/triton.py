"""Triton path of `quantize_fp8`, and the rounding that other kernels share.

The bits of a float8 are made with integers and stored as bytes: so they are the same on every chip, those
without float8 conversions included, and in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.launch import launch

BLOCK = 2048  # 16 numbers a thread: a wide store of bytes


@triton.jit
def e4m3_bits(b_x):
    """Float32 numbers as the bytes of float8_e4m3fn: nearest, ties to even, held to 448; NaN stays."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_size = b_bits & 0x7FFFFFFF
    b_held = tl.minimum(b_size, 0x43E00000)  # 448
    # 20 of the 23 bits of the fraction go; the exponent's bias falls from 127 to 7.
    b_normal = ((b_held + 0x7FFFF + ((b_held >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the numbers are multiples of 2^-9: the last place of 2^14, where the sum is rounded to them.
    b_shifted = b_held.to(tl.float32, bitcast=True) + 16384.0
    b_small = b_shifted.to(tl.int32, bitcast=True) - 0x46800000
    b_code = tl.where(b_held < 0x3C800000, b_small, b_normal)
    b_code = tl.where(b_size > 0x7F800000, 0x7F, b_code)
    return (b_code | ((b_bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit  # a count that is a multiple of 16 is told apart: loads are wide then
def quantize_fp8_kernel(p_x, p_out, inverse, count, BLOCK: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < count
    b_x = tl.load(p_x + o_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_out + o_n, e4m3_bits(b_x * inverse), mask=mask)


@torch.library.custom_op(
    "realign_kernels::quantize_fp8_triton", mutates_args=(), schema="(Tensor x, float scale) -> Tensor"
)
def quantize_fp8_triton(x: Tensor, scale: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    launch(quantize_fp8_kernel, (triton.cdiv(x.numel(), BLOCK),), x, out, 1 / scale, x.numel(), BLOCK=BLOCK)
    return out.view(torch.float8_e4m3fn)


@quantize_fp8_triton.register_fake
def _(x, scale):
    return torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
