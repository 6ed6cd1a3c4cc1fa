"""Definition of `sde_logprob` in plain torch. L packed tokens, C channels, B samples."""

from __future__ import annotations

import torch
from torch import Tensor

from realign_kernels.arguments import LogProbCoefficients, RatioBias, StepCoefficients
from realign_kernels.flow_step.reference import reduce_squares, spread, step_logprob, step_mean


def sde_logprob_reference(
    step: tuple[Tensor, Tensor],
    velocity_LC: Tensor,
    cu_seqlens: Tensor,
    coefficients: StepCoefficients,
    logprob: LogProbCoefficients,
    bias: RatioBias | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob [B] of `step`, the pair (x, x_next), and the ratio's bias [B]; float32 or wider."""
    sample_LC, next_LC = (field.detach() for field in step)
    mean_LC = step_mean(sample_LC, velocity_LC, cu_seqlens, coefficients)
    logprob_B = step_logprob(next_LC, mean_LC, cu_seqlens, logprob)
    if bias is None:
        return logprob_B, None
    wide = mean_LC.dtype
    moved_LC = velocity_LC.to(wide) - bias.old_velocity_LC.detach().to(wide)
    moved_LC = spread(coefficients.b_B, cu_seqlens, moved_LC) * moved_LC
    bias_B = bias.weight_B.to(wide) * reduce_squares(moved_LC, cu_seqlens, logprob.reduction)
    return logprob_B, bias_B


def sde_logprob_gradient(
    step: tuple[Tensor, Tensor],
    velocity_LC: Tensor,
    cu_seqlens: Tensor,
    coefficients: StepCoefficients,
    logprob: LogProbCoefficients,
    bias: RatioBias | None,
    grads: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Gradient of both results to the velocity, in its dtype: what the backward kernels compute.

    `d logprob / d v = 2 weight b (x_next - mean) / n`, `d bias / d v = 2 weight' b**2 (v - v_old) / n`, with
    n the sample's numbers for the mean, 1 for the sum.
    """
    sample_LC, next_LC = step
    mean_LC = step_mean(sample_LC, velocity_LC, cu_seqlens, coefficients)
    wide = mean_LC.dtype
    share_B = torch.ones_like(logprob.weight_B, dtype=wide)
    if logprob.reduction == "mean":
        share_B = share_B / (cu_seqlens.diff() * sample_LC.shape[1]).clamp(min=1)
    scale_B = 2.0 * logprob.weight_B.to(wide) * coefficients.b_B.to(wide) * share_B * grads[0].to(wide)
    grad_LC = spread(scale_B, cu_seqlens, mean_LC) * (next_LC.to(wide) - mean_LC)
    if bias is not None and grads[1] is not None:
        scale_B = 2.0 * bias.weight_B.to(wide) * coefficients.b_B.to(wide) ** 2 * share_B * grads[1].to(wide)
        moved_LC = velocity_LC.to(wide) - bias.old_velocity_LC.to(wide)
        grad_LC = grad_LC + spread(scale_B, cu_seqlens, mean_LC) * moved_LC
    return grad_LC.to(velocity_LC.dtype)
