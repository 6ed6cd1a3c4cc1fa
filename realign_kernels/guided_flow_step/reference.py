"""Definition of `guided_flow_step` in plain torch. L packed tokens, C channels, B samples."""

from __future__ import annotations

import torch
from torch import Tensor

from realign_kernels.arguments import Guidance, LogProbCoefficients, StepCoefficients
from realign_kernels.flow_step.reference import Noise, flow_step_reference
from realign_kernels.guided_velocity.reference import guided_velocity_reference


def guided_flow_step_reference(
    sample_LC: Tensor,
    velocities: tuple[Tensor, Tensor | None, Tensor | None],
    cu_seqlens: Tensor,
    guidance: Guidance,
    coefficients: StepCoefficients,
    noise: Noise = None,
    logprob: LogProbCoefficients | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flow_step(sample, guided_velocity(...))`; the velocity stays in float32 (or float64) in between."""
    wide = torch.promote_types(velocities[0].dtype, torch.float32)
    velocity_LC = guided_velocity_reference(*velocities, cu_seqlens, guidance, wide)
    return flow_step_reference(sample_LC, velocity_LC, cu_seqlens, coefficients, noise, logprob)
