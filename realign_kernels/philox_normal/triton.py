"""Triton path of `philox_normal`, and the functions by which other kernels make noise inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.launch import launch
from realign_kernels.tiles import find_tile, num_programs, tile_constants, tile_offsets


@triton.jit
def log_of_units(units):
    """`ln(units / 2**24)`, as in the reference, operation by operation."""
    bits = (units.to(tl.float32) * 5.960464477539063e-08).to(tl.int32, bitcast=True) + (
        0x3F800000 - 0x3F3504F3
    )
    exponent = ((bits >> 23) - 127).to(tl.float32)
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    series = (((z * (2.0 / 9) + 2.0 / 7) * z + 2.0 / 5) * z + 2.0 / 3) * z
    return exponent * 0.693145751953125 + (s * 2.0 + (s * series + exponent * 1.4286068202862268e-06))


@triton.jit
def cos_sin_of_turn(units):
    """Cosine and sine of `units / 2**24` of a turn, as in the reference, operation by operation."""
    quarter = (units + (1 << 21)) >> 22
    angle = (units - (quarter << 22)).to(tl.float32) * 3.7450702829239286e-07
    z = angle * angle
    sin = ((((z * (1 / 362880) - 1 / 5040) * z + 1 / 120) * z - 1 / 6) * z) * angle + angle
    cos = ((((z * (-1 / 3628800) + 1 / 40320) * z - 1 / 720) * z + 1 / 24) * z - 0.5) * z + 1.0
    is_odd = (quarter & 1) == 1
    across = tl.where(is_odd, sin, cos)
    up = tl.where(is_odd, cos, sin)
    is_back = ((quarter + 1) & 3) >= 2
    is_down = (quarter & 3) >= 2
    return tl.where(is_back, -across, across), tl.where(is_down, -up, up)


@triton.jit
def normal_pair(word_0, word_1):
    """Box-Muller on two random words."""
    radius = tl.sqrt_rn(log_of_units((word_0 >> 8).to(tl.int32) + 1) * -2.0)
    cos, sin = cos_sin_of_turn((word_1 >> 8).to(tl.int32))
    return radius * cos, radius * sin


@triton.jit
def normal_tile(key, step, token, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr):
    """Normals [BT, BC] of a tile that begins at a sample's token number `token`.

    Where a token's numbers fill whole blocks of four, each block is computed once; else once per number.
    """
    o_t = token + tl.arange(0, BT)
    if C % 4 == 0:
        block = o_t[:, None] * (C // 4) + tl.arange(0, BC // 4)[None, :]
        w0, w1, w2, w3 = tl.philox(key, block.to(tl.uint32), step.to(tl.uint32), 0, 0)
        n0, n1 = normal_pair(w0, w1)
        n2, n3 = normal_pair(w2, w3)
        return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    else:
        element = o_t.to(tl.int64)[:, None] * C + tl.arange(0, BC)[None, :]
        w0, w1, w2, w3 = tl.philox(key, (element >> 2).to(tl.uint32), step.to(tl.uint32), 0, 0)
        n0, n1 = normal_pair(w0, w1)
        n2, n3 = normal_pair(w2, w3)
        lane = element & 3
        return tl.where(lane < 2, tl.where(lane == 0, n0, n1), tl.where(lane == 2, n2, n3))


@triton.jit(do_not_specialize=["num_samples"])
def philox_normal_kernel(
    p_key,
    p_step,
    p_cu_seqlens,
    p_out,
    num_samples,
    C: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    BB: tl.constexpr,
):
    i_b, _, token, start, end = find_tile(p_cu_seqlens, tl.program_id(0), num_samples, BT, BB)
    offsets, mask = tile_offsets(token, end, C, BC, BT)
    normals = normal_tile(tl.load(p_key + i_b), tl.load(p_step + i_b), token - start, C, BC, BT)
    tl.store(p_out + offsets, normals, mask=mask)


@torch.library.custom_op(
    "realign_kernels::philox_normal_triton",
    mutates_args=(),
    schema="(Tensor key, Tensor step, Tensor cu_seqlens, int num_tokens, int num_channels) -> Tensor",
)
def philox_normal_triton(
    key: Tensor, step: Tensor, cu_seqlens: Tensor, num_tokens: int, num_channels: int
) -> Tensor:
    """`philox_normal` in one launch."""
    out_LC = torch.empty(num_tokens, num_channels, device=key.device)
    if out_LC.numel():
        constants = tile_constants(num_channels, cu_seqlens)
        num_samples = cu_seqlens.numel() - 1
        grid = (num_programs(num_tokens, num_samples, constants["BT"]),)
        arguments = (key.contiguous(), step.contiguous(), cu_seqlens.contiguous(), out_LC, num_samples)
        launch(philox_normal_kernel, grid, *arguments, **constants)
    return out_LC


@philox_normal_triton.register_fake
def _(key, step, cu_seqlens, num_tokens, num_channels):
    return torch.empty(num_tokens, num_channels, device=key.device)
