"""Where each pixel of a result comes from: resized sizes, crops, and the taps of Pillow's bicubic filter.

Everything here is arithmetic on the host, in float64, once per pair of sizes. A picture is resized along one
axis, then along the other, each time to 8 bits; only the pixels that the crop keeps are ever asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

RESIZE_MODES = ("shortest", "longest", "squash")
PRECISION_BITS = 22  # of a tap's fraction: 32 bits, less 8 of a pixel, less 2 for sums outside of 0 to 255
_SUPPORT = 2.0  # of the bicubic filter, in pixels of the coarser side


@dataclass(frozen=True, eq=False)
class Axis:
    """One side of one picture: `count` pixels of the result, each a weighted sum of neighbouring pixels.

    Attributes:
        offset, count: the run of the result that the picture covers; what is outside is padding.
        starts: int32 [count], the first pixel of each sum.
        lengths: int32 [count], how many pixels it has.
        taps: int32 [count, K], their weights in units of 2^-22; zero from `lengths` on.
    """

    offset: int
    count: int
    starts: Tensor
    lengths: Tensor
    taps: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """The two sides of one picture, and which goes first."""

    y: Axis
    x: Axis
    is_y_first: bool


@lru_cache(maxsize=1024)
def build_plan(height: int, width: int, out_height: int, out_width: int, resize_mode: str) -> Plan:
    """Plan a picture of `height` x `width` pixels for a result of `out_height` x `out_width`."""
    resized_height, resized_width = resized_size(height, width, out_height, out_width, resize_mode)
    return Plan(
        y=_build_axis(height, resized_height, out_height),
        x=_build_axis(width, resized_width, out_width),
        is_y_first=goes_y_first(height - resized_height, width - resized_width),
    )


def goes_y_first(lost_height: int, lost_width: int) -> bool:
    """Pillow's rule since 13.0: y first if the height shrinks by more than twice what the width does."""
    return lost_height > max(0, 2 * lost_width)


def resized_size(
    height: int, width: int, out_height: int, out_width: int, resize_mode: str
) -> tuple[int, int]:
    """Height and width after the resize, before crop or padding. Source: open_clip's and torchvision's."""
    if resize_mode == "squash":
        return out_height, out_width
    if resize_mode == "shortest" and out_height == out_width:
        long = int(out_width * max(height, width) / min(height, width))
        return (long, out_width) if width <= height else (out_height, long)
    choose = min if resize_mode == "shortest" else max
    ratio = choose(height / out_height, width / out_width)
    # One pixel at least is kept of a side that rounds to nothing, where open_clip fails.
    return max(1, round(height / ratio)), max(1, round(width / ratio))


@lru_cache(maxsize=1024)
def _build_axis(size: int, resized: int, out_size: int) -> Axis:
    """Resize `size` pixels to `resized`, then crop or pad evenly to `out_size`."""
    if resized < out_size:
        offset, first, count = (out_size - resized) // 2, 0, resized
    else:
        offset, first, count = 0, round((resized - out_size) / 2), out_size
    return Axis(offset, count, *_bicubic_taps(size, resized, first, count))


def _bicubic_taps(size: int, resized: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Starts, lengths and taps of the pixels from `first` to `first + count`.

    Every operation is Pillow's, in its order (`precompute_coeffs`, `normalize_coeffs_8bpc` of its
    `Resample.c`): a tap that is off by one unit moves pixels.
    """
    scale = size / resized
    filter_scale = max(scale, 1.0)
    support = _SUPPORT * filter_scale
    centers = (torch.arange(first, first + count, dtype=torch.float64) + 0.5) * scale
    starts = (centers - support + 0.5).trunc().clamp(min=0)
    lengths = (centers + support + 0.5).trunc().clamp(max=size) - starts
    index = torch.arange(int(lengths.max()), dtype=torch.float64)
    distances = ((index + starts[:, None]) - centers[:, None] + 0.5) * (1.0 / filter_scale)
    weights = _bicubic(distances).masked_fill_(index >= lengths[:, None], 0.0)
    total = torch.zeros(count, dtype=torch.float64)
    for column in weights.unbind(1):  # one after the other, as Pillow adds them
        total += column
    scaled = weights / total[:, None] * (1 << PRECISION_BITS)
    taps = (scaled + torch.where(scaled < 0, -0.5, 0.5)).trunc().to(torch.int32)
    return starts.to(torch.int32), lengths.to(torch.int32), taps


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2. Source: Keys 1981, "Cubic convolution interpolation", eq. 15."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))
