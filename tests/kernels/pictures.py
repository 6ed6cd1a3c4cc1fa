"""Pictures for the tests of clip_preprocess, and what Pillow and torchvision's operations make of them."""

from __future__ import annotations

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from realign.runtime.prepare import to_picture
from realign_kernels.clip_preprocess.api import OPENAI_MEAN, OPENAI_STD


def make_pictures(sizes: list[tuple[int, int]], seed: int = 0) -> list[Tensor]:
    """Noise [H, W, 3], every other one of black and white alone, whose sums leave the range of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]
    return [pixels if i % 2 else (pixels > 127).to(torch.uint8) * 255 for i, pixels in enumerate(noise)]


def make_decoded(
    sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """What a decoder may give: around [-1, 1], and some outside: [3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return [(0.7 * torch.randn(3, *size, generator=generator)).to(dtype) for size in sizes]


def expected_size(height: int, width: int, out: tuple[int, int], mode: str) -> tuple[int, int]:
    """Height and width after the resize, as torchvision's Resize or open_clip's ResizeKeepRatio has it."""
    if mode == "squash":
        return out
    if mode == "shortest" and out[0] == out[1]:
        if height <= width:
            return out[0], int(out[0] * width / height)
        return int(out[1] * height / width), out[1]
    ratios = (height / out[0], width / out[1])
    ratio = min(ratios) if mode == "shortest" else max(ratios)
    return max(1, round(height / ratio)), max(1, round(width / ratio))


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Pillow's resize. Before 13 it did not go along y first: there, that order is two calls."""
    is_y_first = image.height - height > max(0, 2 * (image.width - width))
    if is_y_first and int(PIL.__version__.partition(".")[0]) < 13:
        image = image.resize((image.width, height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def expected_pixels(pixels_HWC: Tensor, out: tuple[int, int], mode: str, fill: int) -> Tensor:
    """uint8 [*out, 3], by Pillow."""
    height, width = expected_size(*pixels_HWC.shape[:2], out, mode)
    image = resize(Image.fromarray(pixels_HWC.numpy()), height, width)
    if height < out[0] or width < out[1]:
        padded = Image.new("RGB", (max(width, out[1]), max(height, out[0])), (fill, fill, fill))
        padded.paste(image, (max(0, out[1] - width) // 2, max(0, out[0] - height) // 2))
        image = padded
    top, left = (
        round((side - kept) / 2.0) for side, kept in zip((image.height, image.width), out, strict=True)
    )
    return torch.from_numpy(np.array(image.crop((left, top, left + out[1], top + out[0]))))


def normalise(pixels_HWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As torchvision's ToTensor and Normalize do, one operation at a time."""
    pixels_CHW = pixels_HWC.permute(2, 0, 1).float().div(255)
    mean_C11, std_C11 = (torch.tensor(numbers)[:, None, None] for numbers in (OPENAI_MEAN, OPENAI_STD))
    return pixels_CHW.sub(mean_C11).div(std_C11).to(dtype)


def expect(pictures: list[Tensor], out: tuple[int, int], mode: str = "shortest", fill: int = 0) -> Tensor:
    """[B, 3, *out] of uint8 pictures."""
    return torch.stack([normalise(expected_pixels(pixels, out, mode, fill)) for pixels in pictures])


def cut(pixels_CHW: Tensor) -> Tensor:
    """A decoder's picture as it is saved, uint8 [H, W, 3]."""
    return torch.from_numpy(np.array(to_picture(pixels_CHW)))
