"""Triton functions shared by the ops on packed samples: tiles of tokens, cut from each sample's own start.

A sample's tiles, and so the order of its sums, do not depend on its neighbours. The grid needs no host sync:
it has `num_programs(L, B, BT)` programs, and program i belongs to the last sample s with `cu_seqlens[s] // BT
+ s <= i`; a few programs find nothing to do. L packed tokens, C channels, B samples, BT tokens of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE_NUMBERS = 2048


def num_programs(num_tokens: int, num_samples: int, tile_tokens: int) -> int:
    """Programs that cover every tile of every sample, whatever the lengths."""
    return num_tokens // tile_tokens + num_samples if num_samples else 0


def tile_constants(num_channels: int, cu_seqlens: Tensor) -> dict[str, int]:
    """The constants C, BC, BT of a tile and BB of `find_tile`: BT and BC follow from the channels alone."""
    block_channels = triton.next_power_of_2(max(num_channels, 1))
    return {
        "C": num_channels,
        "BC": block_channels,
        "BT": max(1, TILE_NUMBERS // block_channels),
        "BB": triton.next_power_of_2(max(cu_seqlens.numel() - 1, 1)),
    }


@triton.jit
def find_tile(p_cu_seqlens, i_tile, num_samples, BT: tl.constexpr, BB: tl.constexpr):
    """Sample of a program, its first tile, this tile's first token, the sample's first token and its end."""
    o_b = tl.arange(0, BB)
    m_b = o_b < num_samples
    starts = tl.load(p_cu_seqlens + o_b, mask=m_b, other=0)
    i_b = tl.sum((m_b & (starts // BT + o_b <= i_tile)).to(tl.int32), axis=0) - 1
    start = tl.load(p_cu_seqlens + i_b)
    end = tl.load(p_cu_seqlens + i_b + 1)
    first_tile = start // BT + i_b
    return i_b, first_tile, start + (i_tile - first_tile) * BT, start, end


@triton.jit
def count_tiles(start, end, BT: tl.constexpr):
    """Tiles of a sample; one, with nothing in it, for an empty sample."""
    return tl.maximum(tl.cdiv(end - start, BT), 1)


@triton.jit
def tile_offsets(token, end, C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr):
    """Offsets [BT, BC] of a tile's numbers in a packed tensor, 64 bits wide, and which of them are there."""
    o_t = token + tl.arange(0, BT)
    o_c = tl.arange(0, BC)
    mask = (o_t < end)[:, None] & (o_c < C)[None, :]
    return o_t.to(tl.int64)[:, None] * C + o_c[None, :], mask


@triton.jit
def load_wide(pointer, offsets, mask):
    """Numbers as float32; 0 where the mask is off."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_number(pointer, i_b, default: tl.constexpr):
    """A sample's number, or the default where no tensor is given."""
    if pointer is not None:
        return tl.load(pointer + i_b)
    else:
        return tl.full((), default, tl.float32)


@triton.jit
def sum_tiles(p_sums, first_tile, num_tiles, BN: tl.constexpr):
    """The sum of a sample's partial sums, in order. Other programs wrote them: read past the first cache."""
    total = tl.zeros((BN,), tl.float32)
    for i in range(0, num_tiles, BN):
        o_n = i + tl.arange(0, BN)
        total += tl.load(p_sums + first_tile + o_n, mask=o_n < num_tiles, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def is_last_program(p_counters, i_b, num_tiles):
    """True in the one program of a sample that gets here last: it sees what all the others stored before."""
    tl.debug_barrier()
    return tl.atomic_add(p_counters + i_b, 1, sem="acq_rel") == num_tiles - 1
