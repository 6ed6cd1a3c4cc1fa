"""Inputs for the tests of grpo_loss, and the loss as Flow-GRPO and GRPO-Guard write it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from realign_kernels import GrpoMetrics, RatioGuard, VelocityKL, grpo_loss
from tests.kernels.devices import device_of

SCALARS = (
    "policy_loss",
    "approx_kl",
    "ratio_mean",
    "ratio_max",
    "ratio_min",
    "clip_fraction_high",
    "clip_fraction_low",
    "kl_mean",
)


@dataclass(frozen=True)
class LossCase:
    """One call. Where `has_guard`, `has_kl` or `has_weights` is off, those arguments are None."""

    logprob_N: Tensor
    old_N: Tensor
    advantage_N: Tensor
    bias_N: Tensor
    scale_N: Tensor
    guard_weight_N: Tensor
    weight_N: Tensor
    kl_weight_N: Tensor
    velocity_LC: Tensor
    reference_LC: Tensor
    cu_seqlens: Tensor
    has_guard: bool = True
    has_kl: bool = True
    has_weights: bool = True
    clip: tuple[float, float] = (0.1, 0.25)
    beta: float = 0.04
    denominator: float = 7.0

    def to(self, target: torch.device | torch.dtype) -> LossCase:
        """On a device, or all its floats in a dtype."""
        dtype = target if isinstance(target, torch.dtype) else None
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if dtype is not None:
            tensors = {name: value for name, value in tensors.items() if value.is_floating_point()}
        return replace(self, **{name: value.detach().to(target) for name, value in tensors.items()})

    def take(self, index: int) -> LossCase:
        """The case with one entry alone."""
        start, end = self.cu_seqlens[index : index + 2].tolist()
        entry = {name: value[index : index + 1] for name, value in vars(self).items() if name.endswith("_N")}
        packed = {name: value[start:end] for name, value in vars(self).items() if name.endswith("_LC")}
        return replace(self, **entry, **packed, cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32))

    def trained(self) -> dict[str, Tensor]:
        """Leaves that the loss is differentiated to."""
        names = ["logprob_N", *(["bias_N"] * self.has_guard), *(["velocity_LC"] * self.has_kl)]
        return {name: getattr(self, name).detach().clone().requires_grad_() for name in names}


@dataclass(frozen=True)
class LossResult:
    """On the CPU; gradients by the names of the case."""

    loss: Tensor
    metrics: dict[str, Tensor | None]
    grads: dict[str, Tensor]


def make_case(lengths: list[int], channels: int, seed: int = 0, **settings) -> LossCase:
    """Ratios within and beyond the clip range; velocities exact in bfloat16, so that casts lose nothing."""
    generator = torch.Generator().manual_seed(seed)
    count = len(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    old_N = normal(count)
    return LossCase(
        logprob_N=old_N + 0.3 * normal(count),
        old_N=old_N,
        advantage_N=normal(count),
        bias_N=0.1 * normal(count).abs(),
        scale_N=0.5 + torch.rand(count, generator=generator),
        guard_weight_N=1 + torch.rand(count, generator=generator),
        weight_N=torch.rand(count, generator=generator),
        kl_weight_N=3 * torch.rand(count, generator=generator),
        velocity_LC=normal(sum(lengths), channels).bfloat16().float(),
        reference_LC=normal(sum(lengths), channels).bfloat16().float(),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        **settings,
    )


def run_op(case: LossCase, impl: str, factor: float = 1.0) -> LossResult:
    """The op and one backward pass of `factor` times the loss, on the device of the implementation."""
    case = case.to(device_of(impl))
    trained = case.trained()
    case = replace(case, **trained)
    loss, metrics = call_op(case, impl)
    grads = torch.autograd.grad(loss * factor, list(trained.values()))
    grads = {name: grad.cpu() for name, grad in zip(trained, grads, strict=True)}
    metrics = {name: None if value is None else value.cpu() for name, value in vars(metrics).items()}
    return LossResult(loss.detach().cpu(), metrics, grads)


def call_op(case: LossCase, impl: str) -> tuple[Tensor, GrpoMetrics]:
    """The op on the tensors as they are."""
    guard = RatioGuard(case.bias_N, case.scale_N, case.guard_weight_N) if case.has_guard else None
    weight_N = case.weight_N if case.has_weights else None
    kl = None
    if case.has_kl:
        kl_weight_N = case.kl_weight_N if case.has_weights else None
        velocities = (case.velocity_LC, case.reference_LC)
        kl = VelocityKL(*velocities, case.cu_seqlens, case.beta, kl_weight_N)
    numbers = (case.logprob_N, case.old_N, case.advantage_N)
    return grpo_loss(*numbers, case.clip, guard, kl, weight_N, case.denominator, impl)


def run_plain(case: LossCase, factor: float = 1.0) -> LossResult:
    """Op by op, in the dtype of the case: in float64 what is exact, in a lower one what rounding costs."""
    trained = case.trained()
    case = replace(case, **trained)
    low, high = 1 - case.clip[0], 1 + case.clip[1]
    log_ratio_N = case.logprob_N - case.old_N
    approx_kl = 0.5 * torch.mean(log_ratio_N**2)
    if case.has_guard:
        log_ratio_N = (log_ratio_N + case.bias_N) * case.scale_N
    ratio_N = torch.exp(log_ratio_N)
    free_N, clipped_N = -case.advantage_N * ratio_N, -case.advantage_N * torch.clamp(ratio_N, low, high)
    policy_N = torch.max(free_N, clipped_N)
    if case.has_guard:
        policy_N = policy_N * case.guard_weight_N
    weight_N = case.weight_N if case.has_weights else torch.ones_like(case.weight_N)
    policy_loss = (policy_N * weight_N).sum() / case.denominator
    loss, kl_N = policy_loss, None
    if case.has_kl:
        squares_LC = (case.velocity_LC - case.reference_LC) ** 2
        entries = [squares_LC[start:end] for start, end in pairwise(case.cu_seqlens.tolist())]
        kl_N = torch.stack([x.mean() if x.numel() else x.sum() for x in entries])
        kl_N = kl_N * case.kl_weight_N if case.has_weights else kl_N
        loss = loss + case.beta * (kl_N * weight_N).sum() / case.denominator
    metrics = {
        "policy_loss": policy_loss,
        "approx_kl": approx_kl,
        "ratio_mean": ratio_N.mean(),
        "ratio_max": ratio_N.max(),
        "ratio_min": ratio_N.min(),
        "clip_fraction_high": torch.mean((ratio_N - 1.0 > case.clip[1]).to(ratio_N.dtype)),
        "clip_fraction_low": torch.mean((1.0 - ratio_N > case.clip[0]).to(ratio_N.dtype)),
        "kl_mean": None if kl_N is None else kl_N.mean(),
        "ratio_N": ratio_N,
        "kl_N": kl_N,
    }
    grads = torch.autograd.grad(loss * factor, list(trained.values()))
    metrics = {name: None if value is None else value.detach() for name, value in metrics.items()}
    return LossResult(loss.detach(), metrics, dict(zip(trained, grads, strict=True)))
