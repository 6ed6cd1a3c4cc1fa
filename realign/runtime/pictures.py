"""Latents to pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from realign.model.bagel import Bagel, unpatchify_latent
from realign.runtime.context import num_pictures_at_once
from realign.runtime.prepare import to_levels, to_picture
from realign.runtime.sampler import DenoiseJob


@torch.no_grad()
def decode_pictures(
    model: Bagel, jobs: Sequence[DenoiseJob], latents: Sequence[Tensor], stay: bool = False
) -> list[Image.Image] | list[Tensor]:
    """Latents to pictures; those of one size in one call of the autoencoder, as many as its memory allows.

    Pictures that `stay` are uint8 [H, W, 3] on the model's device.
    """
    config = model.config
    by_size: dict[tuple[int, int], list[int]] = {}
    for row, job in enumerate(jobs):
        by_size.setdefault((job.height, job.width), []).append(row)
    finish = to_levels if stay else to_picture
    made: dict[int, Image.Image | Tensor] = {}
    for (height, width), rows in by_size.items():
        grid = (height // config.latent_stride, width // config.latent_stride)
        count = num_pictures_at_once(model.device, height, width)
        for start in range(0, len(rows), count):
            part = rows[start : start + count]
            maps = [unpatchify_latent(latents[row], *grid, config.latent_patch_size) for row in part]
            latent_BCHW = torch.stack(maps).to(model.dtype, memory_format=torch.channels_last)
            pixels_BCHW = model.autoencoder.decode(latent_BCHW)
            made.update(zip(part, map(finish, pixels_BCHW), strict=True))
    return [made[row] for row in range(len(jobs))]
