"""What a kernel must know of each picture of a batch, as one tensor of integers: a record for each.

A kernel filters along a picture's columns first. A picture that goes along y first is handed over
transposed, with its axes exchanged, and the kernel transposes its result back. Records hold addresses: of
the pictures, and of arrays that belong to one axis (how those look is the kernel's own matter) and stay on
the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from realign_kernels.clip_preprocess.plan import Axis, build_plan

# # Address, row stride, channel stride, is_transposed; address, offset, count, depth of the columns; and of
# the rows.
NUM_FIELDS = 12


@dataclass(frozen=True, eq=False)
class AxisArrays:
    """The numbers of one axis as a kernel reads them, and how many pixels each of its sums has room for."""

    numbers: Tensor
    depth: int


PackAxis = Callable[[Axis, torch.device], AxisArrays]


@dataclass(frozen=True, eq=False)
class Table:
    """The records of a batch, and what their addresses point to, which has to live as long as they are used.

    Attributes:
        records_BF: int64 [B, 12].
        pictures: what the records point to: uint8 [H, W, 3] of whole rows, or float planes [3, H, W].
        axes: the columns' and the rows' arrays of each picture.
    """

    records_BF: Tensor
    pictures: list[Tensor]
    axes: list[tuple[AxisArrays, AxisArrays]]


def build_table(
    pictures: Sequence[Tensor], height: int, width: int, resize_mode: str, pack_axis: PackAxis
) -> Table:
    """The table of a batch of one dtype, on the pictures' device, for results of `height` x `width`."""
    kept, keys = [], []
    for picture in pictures:
        is_interleaved = picture.dtype == torch.uint8
        sides = picture.shape[:2] if is_interleaved else picture.shape[1:]
        size = (*sides, height, width, resize_mode)
        is_transposed = build_plan(*size).is_y_first
        if is_transposed:
            picture = picture.transpose(0, 1) if is_interleaved else picture.mT
        picture = _with_known_strides(picture)
        row, channel = (0, 2) if is_interleaved else (1, 0)
        kept.append(picture)
        keys.append((size, picture.data_ptr(), picture.stride(row), picture.stride(channel), is_transposed))
    records_BF, axes = _build_records(tuple(keys), pack_axis, pictures[0].device)
    return Table(records_BF, kept, axes)


def _with_known_strides(picture: Tensor) -> Tensor:
    """The picture, or a copy: of uint8 whole rows lie together, of float a plane's rows."""
    strides = picture.stride()[1:]
    is_known = strides == (3, 1) if picture.dtype == torch.uint8 else strides[1] == 1
    return picture if is_known else picture.contiguous()


@lru_cache(maxsize=64)
def _build_records(
    keys: tuple[tuple, ...], pack_axis: PackAxis, device: torch.device
) -> tuple[Tensor, list[tuple[AxisArrays, AxisArrays]]]:
    """Records on `device`: one copy, and none where the call repeats a recent one."""
    records, all_axes = [], []
    for size, *picture in keys:
        plan = build_plan(*size)
        sides = (plan.y, plan.x) if plan.is_y_first else (plan.x, plan.y)
        axes = tuple(pack_axis(side, device) for side in sides)
        fields = [
            (arrays.numbers.data_ptr(), side.offset, side.count, arrays.depth)
            for arrays, side in zip(axes, sides, strict=True)
        ]
        records.append((*picture, *fields[0], *fields[1]))
        all_axes.append(axes)
    return torch.tensor(records, dtype=torch.int64).to(device), all_axes
