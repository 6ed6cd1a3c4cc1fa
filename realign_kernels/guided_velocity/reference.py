"""Definition of `guided_velocity` in plain torch.

L packed tokens, C channels, B samples, N tokens of one sample.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.linalg import vector_norm

from realign_kernels.arguments import RENORMS, Guidance


def guided_velocity_reference(
    cond_LC: Tensor,
    text_uncond_LC: Tensor | None,
    image_uncond_LC: Tensor | None,
    cu_seqlens: Tensor,
    guidance: Guidance,
    dtype: torch.dtype,
) -> Tensor:
    """Guide each sample by itself, in float32 (float64 stays float64). The guidance's renorm is a tensor."""
    num_samples = cu_seqlens.numel() - 1
    wide = torch.promote_types(cond_LC.dtype, torch.float32)
    text_scales, renorms = guidance.text_scale_B.tolist(), guidance.renorm.tolist()
    image_scales = _list_numbers(guidance.image_scale_B, num_samples, 1.0)
    floors = _list_numbers(guidance.renorm_min_B, num_samples, 0.0)
    guided_LC = cond_LC.to(dtype, copy=True)
    for sample, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        if text_scales[sample] <= 1.0:
            continue
        rows = slice(start, end)
        cond_NC, target_NC = cond_LC[rows].to(wide), text_uncond_LC[rows].to(wide)
        mode, floor = RENORMS[renorms[sample]], floors[sample]
        target_NC = target_NC + text_scales[sample] * (cond_NC - target_NC)
        if mode == "text_channel":
            target_NC = _renorm(cond_NC, target_NC, -1, floor)
        if image_scales[sample] > 1.0:
            image_NC = image_uncond_LC[rows].to(wide)
            target_NC = image_NC + image_scales[sample] * (target_NC - image_NC)
        if mode in ("global", "channel"):
            target_NC = _renorm(cond_NC, target_NC, -1 if mode == "channel" else None, floor)
        guided_LC[rows] = target_NC.to(dtype)
    return guided_LC


def _list_numbers(number_B: Tensor | None, num_samples: int, default: float) -> list[float]:
    return [default] * num_samples if number_B is None else number_B.tolist()


def _renorm(cond_NC: Tensor, guided_NC: Tensor, dim: int | None, floor: float) -> Tensor:
    """Shrink the guided velocity towards the norm of the conditional one; never enlarge it."""
    keepdim = dim is not None
    cond_norm = vector_norm(cond_NC, dim=dim, keepdim=keepdim)
    guided_norm = vector_norm(guided_NC, dim=dim, keepdim=keepdim)
    return guided_NC * (cond_norm / (guided_norm + 1e-8)).clamp(min=floor, max=1.0)
