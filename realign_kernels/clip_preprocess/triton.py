"""`clip_preprocess` in one launch for a batch of different sizes, on the tensor cores' 8-bit products.

A program makes one tile of one picture's result. It filters the rows that the tile needs along the columns,
rounds to 8 bits as Pillow does, and multiplies by the taps of the rows at once: nothing lies in memory in
between. A tap has 22 bits of fraction. It is three signed digits of 8 bits, so a sum is three integer
products, and exact. A picture's columns and rows are those of its record (`table.py`): they may be
exchanged. C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.clip_preprocess.cpp import SCHEMA
from realign_kernels.clip_preprocess.plan import PRECISION_BITS, Axis
from realign_kernels.clip_preprocess.table import NUM_FIELDS, AxisArrays, build_table
from realign_kernels.launch import launch

TILE = 16  # the side of a program's part of the result: the least that a product of matrices takes
# How much of a picture is taken in at a time, and by how many warps: registers have room for no more. Pixels
# take more of them where no load is wide.
WIDE = {"BR": 64, "BC": 64, "num_warps": 4}
NARROW = {"BR": 64, "BC": 64, "num_warps": 8}
INTERLEAVED = {"BR": 32, "BC": 64, "num_warps": 4}
LINE = 8  # pixels: a tile's columns begin at a multiple of this, so that loads are wide


@torch.library.custom_op("realign_kernels::clip_preprocess_triton", mutates_args=(), schema=SCHEMA)
def clip_preprocess_triton(
    pictures: Sequence[Tensor], levels: Tensor, height: int, width: int, resize_mode: str, fill: int
) -> Tensor:
    """Pictures of one dtype to [B, 3, height, width] in the dtype of `levels`, [3, 256]."""
    shape = (len(pictures), 3, height, width)
    out_BCST = torch.empty(shape, dtype=levels.dtype, device=levels.device)
    if not pictures:
        return out_BCST
    table = build_table(pictures, height, width, resize_mode, pack_digits)
    is_interleaved = pictures[0].dtype == torch.uint8
    is_aligned = not is_interleaved and all(map(_is_aligned, table.pictures))
    launch(
        clip_preprocess_kernel,
        (len(pictures) * triton.cdiv(height, TILE) * triton.cdiv(width, TILE),),
        *(table.records_BF, table.pictures[0], levels, out_BCST, height, width, fill),
        NUM_FIELDS=NUM_FIELDS,
        PIXEL_STEP=3 if is_interleaved else 1,
        IS_ALIGNED=is_aligned,
        TILE=TILE,
        LINE=LINE,
        **(INTERLEAVED if is_interleaved else WIDE if is_aligned else NARROW),
        num_stages=1,
    )
    return out_BCST


@clip_preprocess_triton.register_fake
def _(pictures, levels, height, width, resize_mode, fill):
    return levels.new_empty((len(pictures), 3, height, width))


def _is_aligned(picture: Tensor) -> bool:
    """Whether each plane of floats, and each row in it, is made of whole lines, so that loads may be wide."""
    sides = (picture.stride(0), picture.stride(1), picture.shape[2])
    return picture.data_ptr() % 16 == 0 and all(side % LINE == 0 for side in sides)


@lru_cache(maxsize=256)
def pack_digits(axis: Axis, device: torch.device) -> AxisArrays:
    """The taps as digits of matrices, a matrix for each tile of results: N tiles of T results, K pixels.

    int8 digits [N, 3, T, K], low to high; int32 biases [N, T], first pixels [N], ends [N]; where a result is
    padding, zeros. The matrix of a tile begins at its first pixel.
    """
    result_T = axis.offset + torch.arange(axis.count)
    num_tiles = int(result_T[-1]) // TILE + 1
    tile_T, place_T = result_T // TILE, result_T % TILE
    firsts_N = torch.full((num_tiles,), 1 << 30).scatter_reduce_(0, tile_T, axis.starts.long(), "amin")
    firsts_N = firsts_N // LINE * LINE
    ends_N = torch.zeros(num_tiles, dtype=torch.int64)
    ends_N.scatter_reduce_(0, tile_T, (axis.starts + axis.lengths).long(), "amax")
    firsts_N = torch.minimum(firsts_N, ends_N)
    depth = triton.cdiv(int((ends_N - firsts_N).max()), TILE) * TILE  # rows of digits are whole vectors
    taps_NTK = torch.zeros(num_tiles, TILE, depth, dtype=torch.int32)
    index_TK = torch.arange(axis.taps.shape[1]).expand_as(axis.taps)
    is_there_TK = index_TK < axis.lengths[:, None]
    pixel_TK = index_TK + (axis.starts - firsts_N[tile_T])[:, None]
    places = (tile_T[:, None].expand_as(pixel_TK), place_T[:, None].expand_as(pixel_TK), pixel_TK)
    taps_NTK[tuple(place[is_there_TK] for place in places)] = axis.taps[is_there_TK]
    # The kernel subtracts 128 from each pixel, for a signed byte: the bias of a sum puts it back, and rounds.
    biases_NT = 128 * taps_NTK.sum(2, dtype=torch.int32) + (1 << (PRECISION_BITS - 1))
    digits = _split(taps_NTK).view(-1).view(torch.int32)
    tail = (biases_NT.view(-1), firsts_N.to(torch.int32), ends_N.to(torch.int32))
    return AxisArrays(torch.cat([digits, *tail]).to(device), depth)


def _split(taps_NTK: Tensor) -> Tensor:
    """int8 [N, 3, T, K]: low + 256 * middle + 65536 * high."""
    low_NTK = ((taps_NTK + 128) & 255) - 128
    rest_NTK = (taps_NTK - low_NTK) >> 8
    middle_NTK = ((rest_NTK + 128) & 255) - 128
    high_NTK = (rest_NTK - middle_NTK) >> 8
    assert high_NTK.abs().max() < 128, "taps are below 2"
    return torch.stack([low_NTK, middle_NTK, high_NTK], dim=1).to(torch.int8)


@triton.jit
def clip_preprocess_kernel(
    p_records,
    p_first,
    p_levels,
    p_out,
    height,
    width,
    fill,
    NUM_FIELDS: tl.constexpr,
    PIXEL_STEP: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    LINE: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    num_tiles = tl.cdiv(height, TILE) * tl.cdiv(width, TILE)
    i_b = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_tile = tl.program_id(0) % num_tiles
    p_record = p_records + i_b * NUM_FIELDS
    p_pixels = tl.load(p_record).to(p_first.dtype)
    row_stride, channel_stride = tl.load(p_record + 1), tl.load(p_record + 2)
    if IS_ALIGNED:
        p_pixels = tl.multiple_of(p_pixels, 16)
        row_stride, channel_stride = tl.multiple_of(row_stride, LINE), tl.multiple_of(channel_stride, LINE)
    is_transposed = tl.load(p_record + 3) != 0
    num_columns = tl.where(is_transposed, height, width)
    i_y, i_x = i_tile // tl.cdiv(num_columns, TILE), i_tile % tl.cdiv(num_columns, TILE)
    p_x, x_bias, x_first, num_pixels, x_depth, m_x = _load_axis(p_record + 4, i_x, TILE, LINE)
    p_y, y_bias, y_first, num_lines, y_depth, m_y = _load_axis(p_record + 8, i_y, TILE, LINE)
    if IS_ALIGNED:
        num_pixels = tl.cdiv(num_pixels, LINE) * LINE
    o_r, o_c = tl.arange(0, BR), tl.arange(0, BC)
    p_pixels += y_first.to(tl.int64) * row_stride + x_first * PIXEL_STEP

    none, zero = tl.zeros((TILE, BR), tl.int32), tl.zeros((TILE, TILE), tl.int32)
    o_x, o_y = i_x * TILE + tl.arange(0, TILE)[:, None], i_y * TILE + tl.arange(0, TILE)[None, :]
    out_y, out_x = tl.where(is_transposed, o_x, o_y), tl.where(is_transposed, o_y, o_x)
    m_out = (out_y < height) & (out_x < width)
    p_out += i_b * 3 * height * width + (out_y * width + out_x)
    for channel in range(3):
        sums = (zero, zero, zero)
        for row in range(0, num_lines, BR):
            m_r = (row + o_r < num_lines)[:, None]
            p_r = p_pixels + channel * channel_stride + (row + o_r).to(tl.int64)[:, None] * row_stride
            row_sums = (none, none, none)
            for column in range(0, num_pixels, BC):
                m_rc = m_r & (column + o_c < num_pixels)[None, :]
                pixels = _load_pixels(p_r + (column + o_c)[None, :] * PIXEL_STEP, m_rc)
                digits = _load_digits(p_x, column + o_c, x_depth, TILE)
                row_sums = _add_digit_products(digits, tl.trans(pixels), row_sums)
            pixels = _to_signed(_to_level(row_sums, x_bias[:, None]))
            sums = _add_products(pixels, _load_digits(p_y, row + o_r, y_depth, TILE), sums)
        level = tl.where(m_x[:, None] & m_y[None, :], _to_level(sums, y_bias[None, :]), fill)
        tl.store(p_out, tl.load(p_levels + level), mask=m_out)
        p_levels += 256
        p_out += height * width


@triton.jit
def _load_axis(p_record, i_tile, TILE: tl.constexpr, LINE: tl.constexpr):
    """Address of a tile's digits, its biases, first pixel, how many, depth, and what the picture covers."""
    address, offset = tl.load(p_record), tl.load(p_record + 1).to(tl.int32)
    count = tl.load(p_record + 2).to(tl.int32)
    depth = tl.multiple_of(tl.load(p_record + 3).to(tl.int32), TILE)
    num_tiles = (offset + count - 1) // TILE + 1
    o_n = i_tile * TILE + tl.arange(0, TILE)
    covered = (o_n >= offset) & (o_n < offset + count)
    p_digits = tl.multiple_of(address.to(tl.pointer_type(tl.int8)), 16) + i_tile * 3 * depth * TILE
    p_biases = address.to(tl.pointer_type(tl.int32)) + num_tiles * 3 * depth * (TILE // 4)
    is_there = i_tile < num_tiles
    biases = tl.load(p_biases + o_n, mask=covered, other=0)
    first = tl.multiple_of(tl.load(p_biases + num_tiles * TILE + i_tile, mask=is_there, other=0), LINE)
    end = tl.load(p_biases + num_tiles * (TILE + 1) + i_tile, mask=is_there, other=0)
    return p_digits, biases, first, end - first, depth, covered


@triton.jit
def _load_digits(p_digits, o_pixel, depth, TILE: tl.constexpr):
    """Digits [TILE, pixels] of the taps, low, middle, high."""
    pointers = p_digits + (tl.arange(0, TILE)[:, None] * depth + o_pixel[None, :])
    mask = (o_pixel < depth)[None, :]
    low = tl.load(pointers, mask=mask, other=0)
    middle = tl.load(pointers + depth * TILE, mask=mask, other=0)
    return low, middle, tl.load(pointers + 2 * depth * TILE, mask=mask, other=0)


@triton.jit
def _load_pixels(pointers, mask):
    """Pixels less 128, signed; floats in [-1, 1] are cut to 8 bits."""
    pixels = tl.load(pointers, mask=mask, other=0)
    if pixels.dtype.is_floating():
        unit = pixels.to(tl.float32) * 0.5 + 0.5
        unit = tl.where(unit > 0.0, unit, 0.0)  # NaN is 0
        pixels = tl.where(unit < 1.0, unit, 1.0) * 255
    return _to_signed(pixels.to(tl.int32))


@triton.jit
def _to_signed(level):
    return (level - 128).to(tl.int8)


@triton.jit
def _add_digit_products(digits, pixels, sums):
    """Digits [TILE, K] times pixels [K, lines]."""
    low = tl.dot(digits[0], pixels, sums[0], out_dtype=tl.int32)
    middle = tl.dot(digits[1], pixels, sums[1], out_dtype=tl.int32)
    return low, middle, tl.dot(digits[2], pixels, sums[2], out_dtype=tl.int32)


@triton.jit
def _add_products(pixels, digits, sums):
    """Pixels [columns, K] times digits [TILE, K] transposed."""
    low = tl.dot(pixels, tl.trans(digits[0]), sums[0], out_dtype=tl.int32)
    middle = tl.dot(pixels, tl.trans(digits[1]), sums[1], out_dtype=tl.int32)
    return low, middle, tl.dot(pixels, tl.trans(digits[2]), sums[2], out_dtype=tl.int32)


@triton.jit
def _to_level(sums, biases):
    """Sums of pixels times taps, rounded and clipped to 0 to 255."""
    level = (sums[0] + (sums[1] << 8) + (sums[2] << 16) + biases) >> 22
    return tl.minimum(tl.maximum(level, 0), 255)
