"""clip_preprocess: B pictures of H x H pixels to S x S, in 8 bits or as the decoder gives them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench.case import PLAIN, Case, Op, Run, Shape, count_bytes, list_impls
from realign_kernels import clip_preprocess
from realign_kernels.clip_preprocess.api import OPENAI_MEAN, OPENAI_STD

PATHS = ["cpp", "triton"]
# Baselines that resize floats keep what 8 bits round away, or cut: half a level, of pixels that are noise.
RELATIVE_ERROR = 4e-2


def _shapes(dtype: torch.dtype, *sizes: tuple[int, int, int]) -> list[Shape]:
    return [Shape(dict(zip("BHS", size, strict=True)), dtype) for size in sizes]


SMALL = (16, 64, 64)  # pictures of mini, which are as large as they have to be
SIZES = ((1, 1024, 224), (1, 512, 224), (1, 1024, 336), (1, 512, 336), (4, 1024, 224), SMALL)
GPU_SIZES = ((96, 1024, 224), (32, 1024, 224), (1, 1024, 224), (96, 512, 224), (32, 1024, 336), SMALL)
SHAPES = _shapes(torch.float32, *SIZES)
DECODED_SHAPES = [*_shapes(torch.float32, *SIZES[:2], SMALL), *_shapes(torch.bfloat16, SIZES[0])]
GPU_SHAPES = _shapes(torch.bfloat16, *GPU_SIZES)


def _normalise(unit_BCSS: Tensor, dtype: torch.dtype) -> Tensor:
    mean_C11, std_C11 = (
        unit_BCSS.new_tensor(numbers)[:, None, None] for numbers in (OPENAI_MEAN, OPENAI_STD)
    )
    return ((unit_BCSS - mean_C11) / std_C11).to(dtype)


def _resize(pixels_BCHW: Tensor, size: int) -> Tensor:
    return F.interpolate(pixels_BCHW, size=(size, size), mode="bicubic", antialias=True)


def plain_uint8(pictures_BHWC: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Float all along, as tensor pipelines do it."""
    unit_BCHW = pictures_BHWC.permute(0, 3, 1, 2).float() / 255
    return _normalise(_resize(unit_BCHW, size).clamp(0, 1), dtype)


def plain_decoded(decoded_BCHW: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The same, from the decoder's [-1, 1]."""
    unit_BCHW = (decoded_BCHW.float() * 0.5 + 0.5).clamp(0, 1)
    return _normalise(_resize(unit_BCHW, size).clamp(0, 1), dtype)


def resize_uint8(pictures_BHWC: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Torch's own resize of 8-bit pictures, which it has on a CPU alone."""
    levels_BCSS = _resize(pictures_BHWC.permute(0, 3, 1, 2), size)
    return _normalise(levels_BCSS.float() / 255, dtype)


def pillow(pictures: np.ndarray, size: int, dtype: torch.dtype) -> Tensor:
    """Picture after picture, as open_clip's transform does it; without the crop, as pictures are square."""
    resized = [
        Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC) for picture in pictures
    ]
    units = [
        torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255) for image in resized
    ]
    return torch.stack([_normalise(unit_CSS, dtype) for unit_CSS in units])


def build(shape: Shape, device: torch.device) -> Case:
    """Pictures in 8 bits."""
    batch, side, size = shape.sizes.values()
    generator = torch.Generator(device).manual_seed(0)
    pictures_BHWC = torch.randint(
        0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=generator, device=device
    )

    def run(impl: str) -> Run:
        return lambda: clip_preprocess(pictures_BHWC, size, dtype=shape.dtype, impl=impl)

    runs = {PLAIN: lambda: plain_uint8(pictures_BHWC, size, shape.dtype)}
    runs |= {impl: run(impl) for impl in list_impls(PATHS, device)}
    if device.type == "cpu":
        runs["torch uint8"] = lambda: resize_uint8(pictures_BHWC, size, shape.dtype)
        runs["pillow"] = lambda: pillow(pictures_BHWC.numpy(), size, shape.dtype)
    return Case(runs, _count_bytes(pictures_BHWC, shape), RELATIVE_ERROR)


def build_decoded(shape: Shape, device: torch.device) -> Case:
    """The decoder's float pictures. Pillow's way begins with making pictures of them."""
    batch, side, size = shape.sizes.values()
    generator = torch.Generator(device).manual_seed(0)
    decoded_BCHW = torch.rand(batch, 3, side, side, dtype=shape.dtype, generator=generator, device=device)
    decoded_BCHW = decoded_BCHW.mul_(2).sub_(1)

    def run(impl: str) -> Run:
        return lambda: clip_preprocess(decoded_BCHW, size, dtype=shape.dtype, impl=impl)

    def save_and_resize() -> Tensor:
        levels_BCHW = ((decoded_BCHW.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
        return pillow(levels_BCHW.permute(0, 2, 3, 1).numpy(), size, shape.dtype)

    runs = {PLAIN: lambda: plain_decoded(decoded_BCHW, size, shape.dtype)}
    runs |= {impl: run(impl) for impl in list_impls(PATHS, device)}
    if device.type == "cpu":
        runs["pillow"] = save_and_resize
    return Case(runs, _count_bytes(decoded_BCHW, shape), RELATIVE_ERROR)


def _count_bytes(pictures: Tensor, shape: Shape) -> int:
    out_bytes = shape.sizes["B"] * 3 * shape.sizes["S"] ** 2 * shape.dtype.itemsize
    return count_bytes(pictures) + out_bytes


OPS = {
    "clip_preprocess": Op(build, SHAPES, GPU_SHAPES),
    "clip_preprocess.decoded": Op(build_decoded, DECODED_SHAPES, GPU_SHAPES),
}
