"""A sample's pictures as rewards take them that look on the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from realign.rewards.base import Scored


def to_array(picture: Image.Image | Tensor) -> np.ndarray:
    """A picture of any kind that `Scored` may hold to uint8 [H, W, 3], cut to 8 bits as when it is saved."""
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    if picture.dtype != torch.uint8:
        unit_CHW = (picture.detach().float() * 0.5 + 0.5).clamp(0, 1)
        picture = (unit_CHW.nan_to_num(0.0) * 255).to(torch.uint8).permute(1, 2, 0)
    return picture.cpu().numpy()


def to_image(picture: Image.Image | Tensor) -> Image.Image:
    """A picture of any kind that `Scored` may hold as PIL; one that is stays what it is."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(to_array(picture))


def bring_to_host(sample: Scored) -> Scored:
    """The sample with all its pictures as PIL."""
    references = tuple(map(to_image, sample.references))
    return replace(sample, picture=to_image(sample.picture), references=references)
