"""Signature, formula, checks and dispatch of `clip_preprocess`. B pictures, C = 3 channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from realign_kernels.checks import FLOAT_DTYPES
from realign_kernels.clip_preprocess import cpp
from realign_kernels.clip_preprocess.plan import RESIZE_MODES
from realign_kernels.clip_preprocess.reference import clip_preprocess_reference
from realign_kernels.dispatch import choose_impl

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def clip_preprocess(
    pictures: Tensor | Sequence[Tensor],
    size: int | tuple[int, int] = 224,
    resize_mode: str = "shortest",
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    fill: int = 0,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Pictures of different sizes to the input of a CLIP tower: antialiased bicubic resize, crop, normalise.

        out = (pixels / 255 - mean) / std

    with the pixels of Pillow's 8-bit resize, bit for bit: scoring a tensor is scoring the picture it is
    saved as. `"shortest"` makes the short side fit and crops the centre; `"longest"` makes the long side fit
    and pads evenly with `fill`; `"squash"` ignores the aspect. Nothing leaves the device; nothing has a
    gradient.

    Args:
        pictures: one tensor for each, or all in one, of one dtype; their sizes may differ. uint8 [H, W, 3],
            or what a decoder gives: float [3, H, W] in [-1, 1], cut to 8 bits as it is when it is saved.
        size: height and width of the result in pixels; one number is both.
        mean, std: three numbers each, for pixels from 0 to 1. The default is OpenAI's.
        fill: 0 to 255, the padding's level.
        dtype: of the result: float32, bfloat16 or float16.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: [B, 3, height, width].
    Raises: ValueError naming the argument and its value.
    Source: open_clip's `image_transform` without augmentation, on Pillow 13. Older Pillow goes along x first
    with every picture, Pillow 13 along y with those more than about twice as tall as wide: a level's
    difference there.
    """
    pictures = check_pictures(pictures)
    height, width = check_size(size)
    check_options(resize_mode, mean, std, fill, dtype)
    device = pictures[0].device if pictures else torch.device("cpu")
    levels_CV = build_levels(tuple(mean), tuple(std), dtype, device)
    witnesses = [picture for picture in pictures if picture.dtype != torch.uint8] or [levels_CV]
    path = choose_impl("clip_preprocess", impl, witnesses, {"cpp": False, "triton": False})
    run = {"reference": clip_preprocess_reference, "cpp": cpp.clip_preprocess_cpp}.get(path)
    if path == "triton":
        from realign_kernels.clip_preprocess.triton import clip_preprocess_triton as run
    return run(pictures, levels_CV, height, width, resize_mode, fill)


@lru_cache(maxsize=64)
def build_levels(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[3, 256]: what each level of each channel becomes, by the operations of torchvision, in float32."""
    levels_CV = torch.arange(256, dtype=torch.float32).div(255).repeat(3, 1)
    levels_CV.sub_(torch.tensor(mean)[:, None]).div_(torch.tensor(std)[:, None])
    return levels_CV.to(device, dtype)


def check_pictures(pictures: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Raise ValueError unless all are pictures of one dtype on one device. Returns one tensor for each."""
    if isinstance(pictures, Tensor):
        if pictures.dim() != 4:
            raise ValueError(
                f"pictures has shape {tuple(pictures.shape)}: "
                "must be uint8 [B, H, W, 3] or float [B, 3, H, W], or a sequence of pictures"
            )
        pictures = pictures.unbind(0)
    pictures = list(pictures)
    for index, picture in enumerate(pictures):
        _check_picture(f"pictures[{index}]", picture, pictures[0])
    return pictures


def _check_picture(name: str, picture: Tensor, first: Tensor) -> None:
    if picture.dtype != torch.uint8 and picture.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} has dtype {picture.dtype}: must be uint8, or a float dtype for [-1, 1]")
    channels, layout = (-1, "[H, W, 3]") if picture.dtype == torch.uint8 else (0, "[3, H, W]")
    if picture.dim() != 3 or picture.shape[channels] != 3 or 0 in picture.shape:
        raise ValueError(
            f"{name} has dtype {picture.dtype} and shape {tuple(picture.shape)}: must be {layout}, "
            "H and W at least 1"
        )
    if picture.dtype != first.dtype or picture.device != first.device:
        raise ValueError(
            f"{name} is {picture.dtype} on {picture.device}: must be as pictures[0], "
            f"{first.dtype} on {first.device}"
        )


def check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Raise ValueError unless `size` is one or two positive numbers. Returns height and width."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size is {size!r}: must be a positive int, or two, height and width")
    return sides


def check_options(
    resize_mode: str, mean: Sequence[float], std: Sequence[float], fill: int, dtype: torch.dtype
) -> None:
    """Raise ValueError for what is neither a picture nor a size."""
    if resize_mode not in RESIZE_MODES:
        raise ValueError(f"resize_mode is {resize_mode!r}: must be one of {', '.join(RESIZE_MODES)}")
    if len(mean) != 3:
        raise ValueError(f"mean is {mean}: must be three numbers, one for each channel")
    if len(std) != 3 or not min(std) > 0:
        raise ValueError(f"std is {std}: must be three positive numbers, one for each channel")
    if not 0 <= fill <= 255:
        raise ValueError(f"fill is {fill}: must be from 0 to 255")
    if dtype not in OUT_DTYPES:
        raise ValueError(f"dtype is {dtype}: must be float32, bfloat16 or float16")
