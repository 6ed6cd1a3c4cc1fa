"""`clip_preprocess` on the CPU, as a torch custom op over `csrc/clip_preprocess.cpp`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.clip_preprocess.plan import Axis
from realign_kernels.clip_preprocess.table import AxisArrays, build_table

PICTURE_CODES = {**native.DTYPE_CODES, torch.uint8: 3}
SCHEMA = "(Tensor[] pictures, Tensor levels, int height, int width, str resize_mode, int fill) -> Tensor"


@torch.library.custom_op(
    "realign_kernels::clip_preprocess", mutates_args=(), device_types="cpu", schema=SCHEMA
)
def clip_preprocess_cpp(
    pictures: Sequence[Tensor], levels: Tensor, height: int, width: int, resize_mode: str, fill: int
) -> Tensor:
    """Pictures of one dtype to [B, 3, height, width] in the dtype of `levels`, [3, 256]."""
    shape = (len(pictures), 3, height, width)
    out_BCST = torch.empty(shape, dtype=levels.dtype, device=levels.device)
    if not pictures:
        return out_BCST
    table = build_table(pictures, height, width, resize_mode, pack_taps)
    params = native._C.ClipPreprocessParams()
    params.num_pictures, params.height, params.width = len(pictures), height, width
    params.level_bytes, params.fill = levels.element_size(), fill
    params.num_threads = torch.get_num_threads()
    params.type = PICTURE_CODES[pictures[0].dtype]
    params.pictures = table.records_BF.data_ptr()
    params.levels, params.out = levels.data_ptr(), out_BCST.data_ptr()
    native._C.clip_preprocess(params)
    return out_BCST


@clip_preprocess_cpp.register_fake
def _(pictures, levels, height, width, resize_mode, fill):
    return levels.new_empty((len(pictures), 3, height, width))


@lru_cache(maxsize=1024)
def pack_taps(axis: Axis, device: torch.device) -> AxisArrays:
    """starts, lengths, taps: int32 [(2 + K) * count]."""
    numbers = torch.cat([axis.starts, axis.lengths, axis.taps.view(-1)])
    return AxisArrays(numbers.to(device), axis.taps.shape[1])
