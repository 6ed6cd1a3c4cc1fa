"""grpo_loss: forward, backward and metrics of B entries; with a KL of velocities, and without.

Liger's GRPO loss is no baseline here: it starts from the logits of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.case import PLAIN, Case, Compile, Op, Run, Shape, allow_error, count_bytes, list_impls, randn
from bench.inputs import GPU_LATENTS, LATENTS
from realign_kernels import VelocityKL, grpo_loss

CLIP, BETA = 0.1, 0.04
POLICY_SHAPES = [Shape({"B": batch}) for batch in (96, 1536)]


@dataclass(frozen=True)
class Entries:
    """Log-probs, new and old, advantages, and velocities where there is a KL."""

    logprob_B: Tensor
    old_B: Tensor
    advantage_B: Tensor
    kl: VelocityKL | None

    @classmethod
    def build(cls, shape: Shape, device: torch.device) -> Entries:
        """Ratios of which about a third is clipped."""
        wide = Shape(shape.sizes)
        old_B, advantage_B, change_B = (randn(wide, device, "B", seed=seed) for seed in (0, 1, 2))
        kl = None
        if "L" in shape.sizes:
            batch, tokens, channels = (shape.sizes[name] for name in "BLC")
            packed = Shape({"L": batch * tokens, "C": channels}, shape.dtype)
            velocity_LC, reference_LC = (randn(packed, device, "L", "C", seed=seed) for seed in (3, 4))
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
            kl = VelocityKL(velocity_LC.requires_grad_(), reference_LC, cu_seqlens, BETA)
        return cls((old_B + 0.1 * change_B).requires_grad_(), old_B, advantage_B, kl)

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """What the gradients are taken to."""
        return (self.logprob_B,) if self.kl is None else (self.logprob_B, self.kl.velocity_LC)


def plain_loss(
    logprob_B: Tensor,
    old_B: Tensor,
    advantage_B: Tensor,
    velocity_LC: Tensor | None,
    reference_LC: Tensor | None,
) -> tuple[Tensor, ...]:
    """Flow-GRPO's loss and metrics, the KL being the error of velocities."""
    ratio_B = torch.exp(logprob_B - old_B)
    free_B = -advantage_B * ratio_B
    clipped_B = -advantage_B * torch.clamp(ratio_B, 1.0 - CLIP, 1.0 + CLIP)
    policy_loss = torch.mean(torch.maximum(free_B, clipped_B))
    loss, kl_loss = policy_loss, torch.zeros_like(policy_loss)
    if velocity_LC is not None:
        squares_LC = (velocity_LC.float() - reference_LC.float()) ** 2
        kl_loss = torch.mean(squares_LC.view(len(logprob_B), -1).mean(dim=1))
        loss = policy_loss + BETA * kl_loss
    approx_kl = 0.5 * torch.mean((logprob_B - old_B) ** 2)
    high, low = torch.mean((ratio_B - 1.0 > CLIP).float()), torch.mean((1.0 - ratio_B > CLIP).float())
    return loss, policy_loss, kl_loss, approx_kl, high, low, ratio_B.mean(), ratio_B.max(), ratio_B.min()


def build(shape: Shape, device: torch.device) -> Case:
    """One call of the loss and one of the backward pass."""
    entries = Entries.build(shape, device)
    kl, trained = entries.kl, entries.trained
    numbers = (entries.logprob_B, entries.old_B, entries.advantage_B)

    def differentiate(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            results = run()
            gradients = torch.autograd.grad(results[0], trained)
        return (*(result.detach() for result in results), *gradients)

    def ours(impl: str) -> tuple[Tensor, ...]:
        loss, metrics = grpo_loss(*numbers, CLIP, kl=kl, impl=impl)
        kl_mean = torch.zeros_like(loss) if metrics.kl_mean is None else metrics.kl_mean
        clipped = (metrics.clip_fraction_high, metrics.clip_fraction_low)
        ratios = (metrics.ratio_mean, metrics.ratio_max, metrics.ratio_min)
        return loss, metrics.policy_loss, kl_mean, metrics.approx_kl, *clipped, *ratios

    def plain(loss_function: Callable[..., tuple[Tensor, ...]] = plain_loss) -> tuple[Tensor, ...]:
        velocities = (None, None) if kl is None else (kl.velocity_LC, kl.reference_LC)
        return differentiate(lambda: loss_function(*numbers, *velocities))

    def run(impl: str) -> Run:
        return lambda: differentiate(lambda: ours(impl))

    def compile_plain(compile_: Compile) -> Run:
        loss_function = compile_(plain_loss)
        return lambda: plain(loss_function)

    runs = {PLAIN: plain} | {impl: run(impl) for impl in list_impls(["triton"], device)}
    # Values and gradients once each; of the velocities the old ones are read as well.
    num_bytes = count_bytes(*numbers, *trained, *trained, None if kl is None else kl.reference_LC)
    return Case(runs, num_bytes, allow_error(shape), compiled=compile_plain)


OPS = {
    "grpo_loss": Op(build, LATENTS, GPU_LATENTS),
    "grpo_loss.policy": Op(build, POLICY_SHAPES, POLICY_SHAPES),
}
