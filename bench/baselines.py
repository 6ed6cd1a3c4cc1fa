"""What the ops are measured against: plain torch as the reference repositories write it, and libraries.

L packed tokens, C channels, H heads, D head dim, E width, B samples.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor


def find_library(name: str) -> ModuleType | None:
    """Import a module of a library by its dotted name; None where it, or what it needs, is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def plain_guided_velocity(
    cond_LC: Tensor, text_LC: Tensor, image_LC: Tensor, text_scale: float, image_scale: float
) -> Tensor:
    """Text and image guidance of one sample with the global renorm: BAGEL's arithmetic, one op at a time."""
    guided_LC = text_LC + text_scale * (cond_LC - text_LC)
    guided_LC = image_LC + image_scale * (guided_LC - image_LC)
    factor = torch.norm(cond_LC) / (torch.norm(guided_LC) + 1e-8)
    return guided_LC * factor.clamp(min=0.0, max=1.0)


def plain_guided_velocities(
    cond_LC: Tensor,
    text_LC: Tensor,
    image_LC: Tensor,
    offsets: Sequence[int],
    text_scale: float,
    image_scale: float,
) -> Tensor:
    """Sample after sample, because the norm is taken over all that is given."""
    return torch.cat(
        [
            plain_guided_velocity(cond_LC[i:j], text_LC[i:j], image_LC[i:j], text_scale, image_scale)
            for i, j in pairwise(offsets)
        ]
    )


def batched_guided_velocities(
    cond_LC: Tensor,
    text_LC: Tensor,
    image_LC: Tensor,
    num_samples: int,
    text_scale: float,
    image_scale: float,
) -> Tensor:
    """The same for samples of one length, without a loop: what a compiler can make most of."""
    cond_BN, text_BN, image_BN = (x.view(num_samples, -1) for x in (cond_LC, text_LC, image_LC))
    guided_BN = text_BN + text_scale * (cond_BN - text_BN)
    guided_BN = image_BN + image_scale * (guided_BN - image_BN)
    factor_B1 = torch.norm(cond_BN, dim=1, keepdim=True) / (torch.norm(guided_BN, dim=1, keepdim=True) + 1e-8)
    return (guided_BN * factor_B1.clamp(min=0.0, max=1.0)).view(cond_LC.shape)


def plain_flow_step(sample_LC: Tensor, velocity_LC: Tensor, step: float) -> Tensor:
    """Euler: all samples take the same step."""
    return sample_LC - velocity_LC * step


def plain_sde_mean(sample_LC: Tensor, velocity_LC: Tensor, a: float, b: float) -> Tensor:
    """The mean of a noisy step, in float32 as Flow-GRPO's code takes it."""
    return sample_LC.float() * a + velocity_LC.float() * b


def plain_logprob(next_LC: Tensor, mean_LC: Tensor, num_samples: int, std: float, constant: float) -> Tensor:
    """Log-prob of noisy steps of equally long samples, the mean over each: Flow-GRPO's, op by op."""
    logprob_LC = -((next_LC.detach() - mean_LC) ** 2) / (2 * std**2) + constant
    return logprob_LC.view(num_samples, -1).mean(dim=1)


def plain_rms_norm(x_LE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Qwen2's, op by op."""
    x_wide_LE = x_LE.to(torch.float32)
    variance_L1 = x_wide_LE.pow(2).mean(-1, keepdim=True)
    return weight_E * (x_wide_LE * torch.rsqrt(variance_L1 + eps)).to(x_LE.dtype)


def plain_apply_rope(x_LHD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Qwen2's, in the dtype of the heads."""
    half = x_LHD.shape[-1] // 2
    turned_LHD = torch.cat((-x_LHD[..., half:], x_LHD[..., :half]), dim=-1)
    cos_L1D, sin_L1D = (table.to(x_LHD.dtype).unsqueeze(1) for table in (cos_LD, sin_LD))
    return x_LHD * cos_L1D + turned_LHD * sin_L1D


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Qwen2's."""
    return torch.nn.functional.silu(gate) * up
