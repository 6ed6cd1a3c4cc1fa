"""Definition of `flow_step` in plain torch. L packed tokens, C channels, B samples."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from realign_kernels.arguments import LogProbCoefficients, NoiseKeys, StepCoefficients
from realign_kernels.philox_normal.reference import philox_normal_reference

Noise = Tensor | NoiseKeys | None


def flow_step_reference(
    sample_LC: Tensor,
    velocity_LC: Tensor,
    cu_seqlens: Tensor,
    coefficients: StepCoefficients,
    noise: Noise = None,
    logprob: LogProbCoefficients | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`(a * x + b * v) + std * noise`, in float32 (float64 stays float64), in the dtype of `sample_LC`."""
    mean_LC = step_mean(sample_LC, velocity_LC, cu_seqlens, coefficients)
    next_LC = mean_LC
    if coefficients.std_B is not None and noise is not None:
        if isinstance(noise, NoiseKeys):
            noise = philox_normal_reference(noise.key_B, noise.step_B, cu_seqlens, sample_LC.shape[1])
        next_LC = mean_LC + spread(coefficients.std_B, cu_seqlens, mean_LC) * noise.to(mean_LC.dtype)
    next_LC = next_LC.to(sample_LC.dtype)
    if logprob is None:
        return next_LC
    return next_LC, step_logprob(next_LC, mean_LC, cu_seqlens, logprob)


def step_mean(
    sample_LC: Tensor, velocity_LC: Tensor, cu_seqlens: Tensor, coefficients: StepCoefficients
) -> Tensor:
    """`a * x + b * v`, float32 or wider."""
    wide = torch.promote_types(torch.promote_types(sample_LC.dtype, velocity_LC.dtype), torch.float32)
    sample_LC, velocity_LC = sample_LC.to(wide), velocity_LC.to(wide)
    a_L1 = spread(coefficients.a_B, cu_seqlens, sample_LC)
    b_L1 = spread(coefficients.b_B, cu_seqlens, sample_LC)
    return a_L1 * sample_LC + b_L1 * velocity_LC


def step_logprob(
    next_LC: Tensor, mean_LC: Tensor, cu_seqlens: Tensor, logprob: LogProbCoefficients
) -> Tensor:
    """`constant - weight * reduced((x_next - mean) ** 2)`, [B]."""
    error_B = reduce_squares(next_LC.to(mean_LC.dtype) - mean_LC, cu_seqlens, logprob.reduction)
    return logprob.constant_B.to(error_B.dtype) - logprob.weight_B.to(error_B.dtype) * error_B


def reduce_squares(number_LC: Tensor, cu_seqlens: Tensor, reduction: str) -> Tensor:
    """Sum or mean of the squares of each sample, [B]; 0 for a sample without numbers."""
    squares_LC = number_LC.square()
    sums = [squares_LC[start:end].sum() for start, end in pairwise(cu_seqlens.tolist())]
    sum_B = torch.stack(sums) if sums else squares_LC.flatten()[:0]
    if reduction == "sum":
        return sum_B
    return sum_B / (cu_seqlens.diff() * number_LC.shape[1]).clamp(min=1)


def spread(number_B: Tensor, cu_seqlens: Tensor, like_LC: Tensor) -> Tensor:
    """One number a sample to one a token, [L, 1], in the dtype of `like_LC`."""
    number_B = number_B.to(like_LC.dtype)
    return number_B.repeat_interleave(cu_seqlens.diff(), output_size=like_LC.shape[0]).unsqueeze(1)
