"""Definition of `clip_preprocess` in plain torch.

B pictures, H and W a picture's own sides, S and T the result's height and width, K taps, C = 3 channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realign_kernels.clip_preprocess.plan import PRECISION_BITS, Axis, build_plan


def clip_preprocess_reference(
    pictures: Sequence[Tensor], levels_CV: Tensor, height: int, width: int, resize_mode: str, fill: int
) -> Tensor:
    """Resize to 8 bits along one axis, then the other; look each pixel up in `levels_CV`, [3, 256]."""
    shape = (len(pictures), 3, height, width)
    out_BCST = torch.empty(shape, dtype=levels_CV.dtype, device=levels_CV.device)
    channels_C11 = torch.arange(3, device=levels_CV.device)[:, None, None]
    for picture, out_CST in zip(pictures, out_BCST, strict=True):
        pixels_CHW = to_pixels(picture)
        plan = build_plan(*pixels_CHW.shape[1:], height, width, resize_mode)
        if plan.is_y_first:
            covered_CST = _resize(_resize(pixels_CHW.mT, plan.y).mT, plan.x)
        else:
            covered_CST = _resize(_resize(pixels_CHW, plan.x).mT, plan.y).mT
        y, x = (slice(axis.offset, axis.offset + axis.count) for axis in (plan.y, plan.x))
        pixels_CST = torch.full_like(out_CST, fill, dtype=torch.int32)
        pixels_CST[:, y, x] = covered_CST
        out_CST.copy_(levels_CV[channels_C11, pixels_CST])
    return out_BCST


def to_pixels(picture: Tensor) -> Tensor:
    """uint8 [H, W, 3], or the decoder's float [3, H, W] in [-1, 1], to int32 [3, H, W], 0 to 255.

    Floats are cut, not rounded, to 8 bits, as they are when the picture is saved. NaN is 0.
    """
    if picture.dtype == torch.uint8:
        return picture.permute(2, 0, 1).to(torch.int32)
    unit_CHW = (picture.detach().float() * 0.5 + 0.5).clamp(0, 1)
    return (unit_CHW.nan_to_num(0.0) * 255).to(torch.int32)


def _resize(pixels_CHW: Tensor, axis: Axis) -> Tensor:
    """Filter along W: int32 [C, H, axis.count], rounded and clipped to 8 bits."""
    starts_T, taps_TK = axis.starts.to(pixels_CHW.device), axis.taps.to(pixels_CHW.device)
    last = pixels_CHW.shape[2] - 1
    total_CHT = torch.full((), 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=pixels_CHW.device)
    for tap in range(taps_TK.shape[1]):
        columns_T = (starts_T + tap).clamp(max=last)  # beyond the edge taps are zero
        total_CHT = total_CHT + pixels_CHW[:, :, columns_T] * taps_TK[:, tap]
    return (total_CHT >> PRECISION_BITS).clamp(0, 255)
