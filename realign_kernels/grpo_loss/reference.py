"""Definition of `grpo_loss` in plain torch; its autograd is the definition of the gradients.

N entries, each one step of one sample; L packed tokens, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RatioGuard:
    """GRPO-Guard's normalisation of the ratio, `ratio = exp((logprob - old + bias) * scale)`, per entry.

    Attributes:
        bias_N: `mean((mean - old_mean)**2) / (2 s**2)` for a step of deviation s, as `sde_logprob` gives it;
            differentiable. None is 0.
        scale_N: float32 [N] >= 0; s. None is 1.
        weight_N: float32 [N] >= 0, multiplies the surrogate; `1 / -dt`. None is 1.
    """

    bias_N: Tensor | None = None
    scale_N: Tensor | None = None
    weight_N: Tensor | None = None


@dataclass(frozen=True, eq=False)
class VelocityKL:
    """The pull towards a reference model, `kl = weight * mean((velocity - reference)**2)`, per entry.

    The means of two steps from the same x differ by b times the difference of the velocities. So weight 1 is
    the error in velocity space; `b**2 / (2 dev**2)` is the KL of the steps, dev being the deviation that the
    schedule gives for it (Flow-GRPO's leaves out sqrt(-dt)).

    Attributes:
        velocity_LC: differentiable; the velocities of all entries, packed.
        reference_LC: the reference model's, same shape; its dtype may differ.
        cu_seqlens: int32 [N+1], offsets of the entries. An entry without tokens has the KL 0.
        beta: what the KL is multiplied by in the loss.
        weight_N: float32 [N] >= 0; None is 1.
    """

    velocity_LC: Tensor
    reference_LC: Tensor
    cu_seqlens: Tensor
    beta: float
    weight_N: Tensor | None = None


@dataclass(frozen=True, eq=False)
class GrpoMetrics:
    """What to watch: detached, on the device. Means are over all entries, unweighted; NaN if there are none.

    Attributes:
        policy_loss: the loss without the KL.
        approx_kl: `mean((logprob - old)**2) / 2`, Flow-GRPO's.
        ratio_mean, ratio_max, ratio_min: of the ratios; NaN if one is.
        clip_fraction_high, clip_fraction_low: share of ratios above and below the clip range.
        kl_mean: mean KL, without beta; None without a KL.
        ratio_N, kl_N: of each entry; the latter None without a KL.
    """

    policy_loss: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    ratio_min: Tensor
    clip_fraction_high: Tensor
    clip_fraction_low: Tensor
    kl_mean: Tensor | None
    ratio_N: Tensor
    kl_N: Tensor | None


def grpo_loss_reference(
    log_probs: tuple[Tensor, Tensor],
    advantage_N: Tensor,
    clip: tuple[float, float],
    guard: RatioGuard,
    kl: VelocityKL | None,
    weight_N: Tensor | None,
    denominator: float,
) -> tuple[Tensor, GrpoMetrics]:
    """Float32, or float64 if an input is. `log_probs` are the new and the old."""
    wide = _find_wide(
        *log_probs, advantage_N, guard.bias_N, *((kl.velocity_LC, kl.reference_LC) if kl else ())
    )
    logprob_N, old_N = log_probs[0].to(wide), log_probs[1].detach().to(wide)
    advantage_N = advantage_N.detach().to(wide)
    difference_N = logprob_N - old_N
    log_ratio_N = difference_N if guard.bias_N is None else difference_N + guard.bias_N.to(wide)
    ratio_N = torch.exp(_weigh(log_ratio_N, guard.scale_N))
    low, high = 1.0 - clip[0], 1.0 + clip[1]
    surrogate_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(low, high))
    policy_N = _weigh(surrogate_N, guard.weight_N)
    policy_loss = _weigh(policy_N, weight_N).sum() / denominator
    loss, kl_N = policy_loss, None
    if kl is not None:
        kl_N = _weigh(_mean_squares(kl, wide), kl.weight_N)
        loss = _weigh(policy_N + kl.beta * kl_N, weight_N).sum() / denominator
    metrics = _measure(policy_loss, difference_N, ratio_N, (low, high), kl_N)
    return loss, metrics


def _find_wide(*tensors: Tensor | None) -> torch.dtype:
    dtypes = [tensor.dtype for tensor in tensors if tensor is not None]
    return reduce(torch.promote_types, dtypes, torch.float32)


def _weigh(x_N: Tensor, weight_N: Tensor | None) -> Tensor:
    return x_N if weight_N is None else x_N * weight_N.detach().to(x_N.dtype)


def _mean_squares(kl: VelocityKL, wide: torch.dtype) -> Tensor:
    """Entry by entry: one has its bits whatever lies beside it."""
    difference_LC = kl.velocity_LC.to(wide) - kl.reference_LC.detach().to(wide)
    entries = [difference_LC[start:end] for start, end in pairwise(kl.cu_seqlens.tolist())]
    means = [entry.square().sum() / max(entry.numel(), 1) for entry in entries]
    return torch.stack(means) if means else difference_LC.flatten()


def _measure(
    policy_loss: Tensor,
    difference_N: Tensor,
    ratio_N: Tensor,
    bounds: tuple[float, float],
    kl_N: Tensor | None,
) -> GrpoMetrics:
    ratio_N = ratio_N.detach()
    extremes = (ratio_N.max(), ratio_N.min()) if len(ratio_N) else (ratio_N.new_tensor(math.nan),) * 2
    return GrpoMetrics(
        policy_loss=policy_loss.detach(),
        approx_kl=0.5 * difference_N.detach().square().mean(),
        ratio_mean=ratio_N.mean(),
        ratio_max=extremes[0],
        ratio_min=extremes[1],
        clip_fraction_high=(ratio_N > bounds[1]).to(ratio_N.dtype).mean(),
        clip_fraction_low=(ratio_N < bounds[0]).to(ratio_N.dtype).mean(),
        kl_mean=None if kl_N is None else kl_N.detach().mean(),
        ratio_N=ratio_N,
        kl_N=None if kl_N is None else kl_N.detach(),
    )
