"""Definition of `guided_flow_step` in plain torch. L packed tokens, C channels, B samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realign_kernels.flow_step.reference import flow_step_reference
from realign_kernels.guided_velocity.reference import guided_velocity_reference


def guided_flow_step_reference(
    sample_LC: Tensor,
    cond_LC: Tensor,
    text_uncond_LC: Tensor | None,
    image_uncond_LC: Tensor | None,
    cu_seqlens: Tensor,
    text_scale_B: Tensor,
    image_scale_B: Tensor | None,
    a_B: Tensor,
    b_B: Tensor,
    std_B: Tensor | None,
    noise_LC: Tensor | None,
    renorm: Sequence[str],
    renorm_min_B: Tensor | None,
) -> Tensor:
    """`flow_step(sample, guided_velocity(...))`; the velocity stays in float32 (or float64) in between."""
    wide = torch.promote_types(cond_LC.dtype, torch.float32)
    velocity_LC = guided_velocity_reference(
        cond_LC.to(wide),
        text_uncond_LC,
        image_uncond_LC,
        cu_seqlens,
        text_scale_B,
        image_scale_B,
        renorm,
        renorm_min_B,
    )
    return flow_step_reference(sample_LC, velocity_LC, cu_seqlens, a_B, b_B, std_B, noise_LC)
