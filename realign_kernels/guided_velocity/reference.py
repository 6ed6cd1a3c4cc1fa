"""Definition of `guided_velocity` in plain torch.

L packed tokens, C channels, B samples, N tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.linalg import vector_norm


def guided_velocity_reference(
    cond_LC: Tensor,
    text_uncond_LC: Tensor | None,
    image_uncond_LC: Tensor | None,
    cu_seqlens: Tensor,
    text_scale_B: Tensor,
    image_scale_B: Tensor | None,
    renorm: Sequence[str],
    renorm_min_B: Tensor | None,
) -> Tensor:
    """Guide each sample by itself, in float32 (float64 stays float64); returns the dtype of `cond_LC`."""
    num_samples = cu_seqlens.numel() - 1
    wide = torch.promote_types(cond_LC.dtype, torch.float32)
    text_scales = text_scale_B.tolist()
    image_scales = [1.0] * num_samples if image_scale_B is None else image_scale_B.tolist()
    renorm_mins = [0.0] * num_samples if renorm_min_B is None else renorm_min_B.tolist()
    guided_LC = cond_LC.clone()
    for sample, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        if text_scales[sample] <= 1.0:
            continue
        rows = slice(start, end)
        cond_NC, target_NC = cond_LC[rows].to(wide), text_uncond_LC[rows].to(wide)
        mode, floor = renorm[sample], renorm_mins[sample]
        target_NC = target_NC + text_scales[sample] * (cond_NC - target_NC)
        if mode == "text_channel":
            target_NC = _renorm(cond_NC, target_NC, -1, floor)
        if image_scales[sample] > 1.0:
            image_NC = image_uncond_LC[rows].to(wide)
            target_NC = image_NC + image_scales[sample] * (target_NC - image_NC)
        if mode in ("global", "channel"):
            target_NC = _renorm(cond_NC, target_NC, -1 if mode == "channel" else None, floor)
        guided_LC[rows] = target_NC.to(cond_LC.dtype)
    return guided_LC


def _renorm(cond_NC: Tensor, guided_NC: Tensor, dim: int | None, floor: float) -> Tensor:
    """Shrink the guided velocity towards the norm of the conditional one; never enlarge it."""
    keepdim = dim is not None
    cond_norm = vector_norm(cond_NC, dim=dim, keepdim=keepdim)
    guided_norm = vector_norm(guided_NC, dim=dim, keepdim=keepdim)
    return guided_NC * (cond_norm / (guided_norm + 1e-8)).clamp(min=floor, max=1.0)
