"""Signature, formula, checks and dispatch of `grpo_loss`. N entries, L packed tokens, C channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from realign_kernels.checks import check_cu_seqlens, check_dtype, check_like, check_packed, check_per_sample
from realign_kernels.dispatch import choose_impl
from realign_kernels.grpo_loss.reference import GrpoMetrics, RatioGuard, VelocityKL, grpo_loss_reference


def grpo_loss(
    logprob_N: Tensor,
    old_logprob_N: Tensor,
    advantage_N: Tensor,
    clip: float | tuple[float, float],
    guard: RatioGuard | None = None,
    kl: VelocityKL | None = None,
    weight_N: Tensor | None = None,
    denominator: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, GrpoMetrics]:
    """GRPO's loss over entries i, each one step of one sample:

        ratio = exp((logprob - old_logprob + guard.bias) * guard.scale)
        policy = max(-A * ratio, -A * clamp(ratio, 1 - clip_low, 1 + clip_high)) * guard.weight
        kl = mean((kl.velocity - kl.reference)**2) * kl.weight
        loss = sum((policy + kl.beta * kl) * weight) / denominator

    Gradients are those of plain torch: within the clip range, its ends included, the slope of the policy term
    in the ratio is -A; beyond, it is -A or 0.

    Args:
        logprob_N: [N], float32, bfloat16, float16 or float64.
        old_logprob_N: [N], those recorded while sampling; they should be float32.
        advantage_N: [N].
        clip: how far the ratio may leave 1: below 1 and above, or one number for both.
        guard: GRPO-Guard's bias and scale of the log-ratio and weight of the surrogate; None is plain GRPO.
        kl: velocities, reference velocities, beta and weights; None is no KL.
        weight_N: float32 [N] >= 0, an entry's share in the loss; None is 1. The metrics ignore it.
        denominator: N if None. Who adds up gradients of several calls, or over ranks, gives all the number of
            entries of them together.
        impl: `"auto"` (table in `dispatch.py`), `"reference"` or `"triton"`. Triton makes gradients in the
            forward pass and scales them in place: with a KL a second backward raises RuntimeError.

    Returns: the loss, float32 (float64 if an input is), and the metrics. Differentiable in `logprob_N`,
        `guard.bias_N` and `kl.velocity_LC` only. Without entries it is 0.
    Raises: ValueError naming the argument and its value.
    Source: Flow-GRPO, arXiv 2505.05470; GRPO-Guard, arXiv 2510.22319; asymmetric clip: DAPO, arXiv
        2503.14476; KL of velocities: UniGRPO, arXiv 2603.23500.
    """
    guard = guard or RatioGuard()
    clip = clip if isinstance(clip, tuple) else (clip, clip)
    _check_entries(logprob_N, old_logprob_N, advantage_N, guard, weight_N)
    _check_numbers(clip, denominator)
    if kl is not None:
        _check_kl(kl, logprob_N)
    denominator = max(len(logprob_N), 1) if denominator is None else denominator
    tensors = (logprob_N, guard.bias_N, *((kl.velocity_LC, kl.reference_LC) if kl else ()))
    tensors = (*tensors, old_logprob_N, advantage_N)
    arguments = ((logprob_N, old_logprob_N), advantage_N, clip, guard, kl, weight_N, float(denominator))
    if choose_impl("grpo_loss", impl, tensors, {"triton": True}) == "triton":
        from realign_kernels.grpo_loss.triton import run_grpo_loss

        return run_grpo_loss(*arguments)
    return grpo_loss_reference(*arguments)


def _check_entries(
    logprob_N: Tensor, old_N: Tensor, advantage_N: Tensor, guard: RatioGuard, weight_N: Tensor | None
) -> None:
    if logprob_N.dim() != 1:
        raise ValueError(f"logprob_N has shape {tuple(logprob_N.shape)}: must be [N], one number per entry")
    check_dtype("logprob_N", logprob_N.dtype)
    check_like("old_logprob_N", old_N, "logprob_N", logprob_N, same_dtype=False)
    check_like("advantage_N", advantage_N, "logprob_N", logprob_N, same_dtype=False)
    if guard.bias_N is not None:
        check_like("guard.bias_N", guard.bias_N, "logprob_N", logprob_N, same_dtype=False)
    weights = {"guard.scale_N": guard.scale_N, "guard.weight_N": guard.weight_N, "weight_N": weight_N}
    for name, number_N in weights.items():
        if number_N is not None:
            check_per_sample(name, number_N, len(logprob_N), logprob_N, minimum=0.0)


def _check_numbers(clip: tuple[float, float], denominator: float | None) -> None:
    low, high = clip
    if not 0 <= low <= 1:
        raise ValueError(f"clip is {clip}: must reach from 0 to 1 below a ratio of 1, not {low}")
    if not (math.isfinite(high) and high >= 0):
        raise ValueError(
            f"clip is {clip}: must reach 0 or more, and finitely far, above a ratio of 1, not {high}"
        )
    if denominator is not None and not (math.isfinite(denominator) and denominator > 0):
        raise ValueError(f"denominator is {denominator}: must be finite and above 0, or None for N")


def _check_kl(kl: VelocityKL, logprob_N: Tensor) -> None:
    check_packed("kl.velocity_LC", kl.velocity_LC)
    check_like("kl.reference_LC", kl.reference_LC, "kl.velocity_LC", kl.velocity_LC, same_dtype=False)
    _check_device("kl.velocity_LC", kl.velocity_LC, logprob_N.device)
    num_entries = check_cu_seqlens(kl.cu_seqlens, kl.velocity_LC)
    if num_entries != len(logprob_N):
        raise ValueError(
            f"kl.cu_seqlens has {num_entries} entries: must have as many as logprob_N, {len(logprob_N)}"
        )
    if not (math.isfinite(kl.beta) and kl.beta >= 0):
        raise ValueError(f"kl.beta is {kl.beta}: must be finite and at least 0")
    if kl.weight_N is not None:
        check_per_sample("kl.weight_N", kl.weight_N, num_entries, kl.velocity_LC, minimum=0.0)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {device} with logprob_N")
