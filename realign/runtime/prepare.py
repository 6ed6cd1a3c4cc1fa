"""Reference pictures to what the model sees: the resize rules, and pixels in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from realign.model.config import BagelConfig, ResizeRule

MAX_PIXELS = 14 * 14 * 9 * 1024  # BAGEL's own bound, met only by very long pictures


@dataclass(frozen=True, eq=False)
class PreparedPicture:
    """A reference picture as the autoencoder and the ViT see it: pixels float32 [3, H, W] in [-1, 1].

    `height`, `width` are the autoencoder's, which a picture made from it takes over.
    """

    vae_CHW: Tensor
    vit_CHW: Tensor

    @property
    def height(self) -> int:
        return self.vae_CHW.shape[1]

    @property
    def width(self) -> int:
        return self.vae_CHW.shape[2]


def fit_picture(image: Image.Image, config: BagelConfig) -> PreparedPicture:
    """Resize by the autoencoder's rule, and the result by the ViT's."""
    for_vae = resize_picture(to_rgb(image), config.vae_resize)
    for_vit = resize_picture(for_vae, config.vit_resize)
    return PreparedPicture(to_pixels(for_vae), to_pixels(for_vit))


def crop_picture(image: Image.Image, config: BagelConfig) -> PreparedPicture:
    """No resize: cropped to whole latent tokens, and to whole ViT patches."""
    pixels_CHW = to_pixels(to_rgb(image))
    return PreparedPicture(
        *(_crop(pixels_CHW, stride) for stride in (config.latent_stride, config.vit.patch_size))
    )


def resize_picture(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """Bicubic, antialiased, to `resized_size`."""
    return image.resize(resized_size(image.size, rule), Image.Resampling.BICUBIC)


def resized_size(size: tuple[int, int], rule: ResizeRule) -> tuple[int, int]:
    """The (width, height) that a picture of `size` is resized to.

    The long side becomes at most `max_size`, the short one at least `min_size` if the first allows it; both
    become multiples of `stride`. Source: BAGEL, arXiv 2505.14683, `MaxLongEdgeMinShortEdgeResize`.
    """
    scale = max(min(rule.max_size / max(size), 1.0), rule.min_size / min(size))
    size = _scaled(size, scale, rule.stride)
    if size[0] * size[1] > MAX_PIXELS:
        size = _scaled(size, MAX_PIXELS / (size[0] * size[1]), rule.stride)
    if max(size) > rule.max_size:
        size = _scaled(size, rule.max_size / max(size), rule.stride)
    return size


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, transparent parts on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def to_pixels(image: Image.Image | np.ndarray) -> Tensor:
    """RGB picture, or its uint8 [H, W, 3], to float32 [3, H, W] in [-1, 1]."""
    pixels_HWC = torch.from_numpy(np.asarray(image, dtype=np.float32))
    return pixels_HWC.permute(2, 0, 1).contiguous() / 127.5 - 1.0


def to_levels(pixels_CHW: Tensor) -> Tensor:
    """Pixels about in [-1, 1] to uint8 [H, W, 3] on their device; clamped, and cut (not rounded) to 8 bits as
    BAGEL does.
    """
    levels_HWC = ((pixels_CHW.float() * 0.5 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0)
    return levels_HWC.to(torch.uint8, memory_format=torch.contiguous_format)


def to_picture(pixels_CHW: Tensor) -> Image.Image:
    """Pixels about in [-1, 1] to an RGB picture, of `to_levels`."""
    return Image.fromarray(to_levels(pixels_CHW).cpu().numpy())


def _scaled(size: tuple[int, int], scale: float, stride: int) -> tuple[int, int]:
    """Scaled, rounded to pixels, then to multiples of `stride`, at least one."""
    width, height = (max(stride, round(round(side * scale) / stride) * stride) for side in size)
    return width, height


def _crop(pixels_CHW: Tensor, stride: int) -> Tensor:
    height, width = (side // stride * stride for side in pixels_CHW.shape[1:])
    return pixels_CHW[:, :height, :width].contiguous()
