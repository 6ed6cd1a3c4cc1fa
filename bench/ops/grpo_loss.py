"""grpo_loss: forward, backward and metrics of B entries; with a KL of velocities; without; as GRPO-Guard.

Liger's GRPO loss is no baseline here: it starts from the logits of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.case import PLAIN, Case, Compile, Op, Run, Shape, allow_error, count_bytes, list_impls, randn
from bench.inputs import GPU_LATENTS, LATENTS
from realign_kernels import RatioGuard, VelocityKL, grpo_loss

CLIP, BETA = 0.1, 0.04
POLICY_SHAPES = [Shape({"B": batch}) for batch in (96, 1536)]


@dataclass(frozen=True)
class Entries:
    """Log-probs, new and old, advantages; velocities where there is a KL; GRPO-Guard's numbers if asked."""

    logprob_B: Tensor
    old_B: Tensor
    advantage_B: Tensor
    kl: VelocityKL | None
    guard: RatioGuard | None

    @classmethod
    def build(cls, shape: Shape, device: torch.device, has_guard: bool) -> Entries:
        """Ratios of which about a third is clipped."""
        wide = Shape(shape.sizes)
        old_B, advantage_B, change_B, bias_B = (randn(wide, device, "B", seed=seed) for seed in range(4))
        kl, guard = None, None
        if has_guard:
            ones_B = torch.ones_like(old_B)
            guard = RatioGuard((0.01 * bias_B).requires_grad_(), 0.9 * ones_B, 12.0 * ones_B)
        if "L" in shape.sizes:
            batch, tokens, channels = (shape.sizes[name] for name in "BLC")
            packed = Shape({"L": batch * tokens, "C": channels}, shape.dtype)
            velocity_LC, reference_LC = (randn(packed, device, "L", "C", seed=seed) for seed in (4, 5))
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
            kl = VelocityKL(velocity_LC.requires_grad_(), reference_LC, cu_seqlens, BETA)
        return cls((old_B + 0.1 * change_B).requires_grad_(), old_B, advantage_B, kl, guard)

    @property
    def trained(self) -> list[Tensor]:
        """What the gradients are taken to."""
        bias_B = None if self.guard is None else self.guard.bias_N
        velocity_LC = None if self.kl is None else self.kl.velocity_LC
        return [tensor for tensor in (self.logprob_B, bias_B, velocity_LC) if tensor is not None]


def plain_loss(entries: Entries) -> tuple[Tensor, ...]:
    """Flow-GRPO's loss and metrics, the KL being the error of velocities; GRPO-Guard's numbers if given."""
    log_ratio_B = entries.logprob_B - entries.old_B
    approx_kl = 0.5 * torch.mean(log_ratio_B**2)
    if entries.guard is not None:
        log_ratio_B = (log_ratio_B + entries.guard.bias_N) * entries.guard.scale_N
    ratio_B = torch.exp(log_ratio_B)
    free_B = -entries.advantage_B * ratio_B
    clipped_B = -entries.advantage_B * torch.clamp(ratio_B, 1.0 - CLIP, 1.0 + CLIP)
    policy_B = torch.maximum(free_B, clipped_B)
    if entries.guard is not None:
        policy_B = policy_B * entries.guard.weight_N
    policy_loss = torch.mean(policy_B)
    loss, kl_loss = policy_loss, torch.zeros_like(policy_loss)
    if entries.kl is not None:
        squares_LC = (entries.kl.velocity_LC.float() - entries.kl.reference_LC.float()) ** 2
        kl_loss = torch.mean(squares_LC.view(len(ratio_B), -1).mean(dim=1))
        loss = policy_loss + BETA * kl_loss
    high, low = torch.mean((ratio_B - 1.0 > CLIP).float()), torch.mean((1.0 - ratio_B > CLIP).float())
    return loss, policy_loss, kl_loss, approx_kl, high, low, ratio_B.mean(), ratio_B.max(), ratio_B.min()


def our_loss(entries: Entries, impl: str) -> tuple[Tensor, ...]:
    """The same results."""
    numbers = (entries.logprob_B, entries.old_B, entries.advantage_B)
    loss, metrics = grpo_loss(*numbers, CLIP, entries.guard, entries.kl, impl=impl)
    kl_mean = torch.zeros_like(loss) if metrics.kl_mean is None else metrics.kl_mean
    clipped = (metrics.clip_fraction_high, metrics.clip_fraction_low)
    ratios = (metrics.ratio_mean, metrics.ratio_max, metrics.ratio_min)
    return loss, metrics.policy_loss, kl_mean, metrics.approx_kl, *clipped, *ratios


def differentiate(
    loss_function: Callable[..., tuple[Tensor, ...]], entries: Entries, *rest
) -> tuple[Tensor, ...]:
    """What the function gives, loss first, and the gradients of that."""
    with torch.enable_grad():
        results = loss_function(entries, *rest)
        gradients = torch.autograd.grad(results[0], entries.trained)
    return (*(result.detach() for result in results), *gradients)


def build(has_guard: bool, shape: Shape, device: torch.device) -> Case:
    """One call of the loss and one of the backward pass."""
    entries = Entries.build(shape, device, has_guard)

    def compile_plain(compile_: Compile) -> Run:
        return partial(differentiate, compile_(plain_loss), entries)

    runs = {PLAIN: partial(differentiate, plain_loss, entries)}
    runs |= {impl: partial(differentiate, our_loss, entries, impl) for impl in list_impls(["triton"], device)}
    # What is trained is read and its gradient written; the rest is read.
    records = [entries.old_B, entries.advantage_B]
    records += [] if entries.kl is None else [entries.kl.reference_LC]
    records += [] if entries.guard is None else [entries.guard.scale_N, entries.guard.weight_N]
    num_bytes = count_bytes(*entries.trained, *entries.trained, *records)
    return Case(runs, num_bytes, allow_error(shape), compiled=compile_plain)


OPS = {
    "grpo_loss": Op(partial(build, False), LATENTS, GPU_LATENTS),
    "grpo_loss.guard": Op(partial(build, True), LATENTS[:1], GPU_LATENTS[:2]),
    "grpo_loss.policy": Op(partial(build, False), POLICY_SHAPES, POLICY_SHAPES),
}
