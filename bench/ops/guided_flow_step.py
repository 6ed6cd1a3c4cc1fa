"""guided_flow_step: both guidances, the global renorm, and an Euler step; a noisy step with its log-prob."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import baselines
from bench.case import PLAIN, Case, Op, Run, Shape, allow_error, count_bytes, list_impls
from bench.inputs import GPU_LATENTS, IMAGE_SCALE, LATENTS, SDE, STEP, TEXT_SCALE, Flow
from realign_kernels import guided_flow_step

PATHS = ["cpp", "triton", "cuda"]


def build(shape: Shape, device: torch.device) -> Case:
    """Equal samples with three branches; the baselines are guidance, then the step."""
    flow = Flow.build(shape, device)
    scales = (TEXT_SCALE, IMAGE_SCALE)

    def plain() -> Tensor:
        velocity_LC = baselines.plain_guided_velocities(*flow.branches, flow.offsets, *scales)
        return baselines.plain_flow_step(flow.sample_LC, velocity_LC, STEP)

    def batched() -> Tensor:
        velocity_LC = baselines.batched_guided_velocities(*flow.branches, shape.sizes["B"], *scales)
        return baselines.plain_flow_step(flow.sample_LC, velocity_LC, STEP)

    def run(impl: str) -> Run:
        step = (flow.branches, flow.cu_seqlens, flow.guidance, flow.euler)
        return lambda: guided_flow_step(flow.sample_LC, *step, impl=impl)

    runs = {PLAIN: plain} | {impl: run(impl) for impl in list_impls(PATHS, device)}
    num_bytes = count_bytes(flow.sample_LC, *flow.branches, flow.sample_LC)
    return Case(runs, num_bytes, allow_error(shape), compiled=lambda compile_it: compile_it(batched))


def build_sde(shape: Shape, device: torch.device) -> Case:
    """Noise, and the log-prob of each sample. The baselines are given the noise that ours make inside."""
    flow = Flow.build(shape, device)
    batch, scales, constant = shape.sizes["B"], (TEXT_SCALE, IMAGE_SCALE), 0.98

    def step_from(velocity_LC: Tensor) -> tuple[Tensor, Tensor]:
        mean_LC = baselines.plain_sde_mean(flow.sample_LC, velocity_LC, SDE["a"], SDE["b"])
        next_LC = mean_LC + SDE["std"] * flow.noise_LC
        return next_LC, baselines.plain_logprob(next_LC, mean_LC, batch, SDE["std"], constant)

    def plain() -> tuple[Tensor, Tensor]:
        return step_from(baselines.plain_guided_velocities(*flow.branches, flow.offsets, *scales))

    def batched() -> tuple[Tensor, Tensor]:
        return step_from(baselines.batched_guided_velocities(*flow.branches, batch, *scales))

    def run(impl: str) -> Run:
        step = (flow.branches, flow.cu_seqlens, flow.guidance, flow.sde, flow.keys, flow.logprob)
        return lambda: guided_flow_step(flow.sample_LC, *step, impl=impl)

    runs = {PLAIN: plain} | {impl: run(impl) for impl in list_impls(PATHS, device)}
    num_bytes = count_bytes(flow.sample_LC, *flow.branches, flow.sample_LC)
    return Case(runs, num_bytes, allow_error(shape), compiled=lambda compile_it: compile_it(batched))


OPS = {
    "guided_flow_step": Op(build, LATENTS, GPU_LATENTS),
    "guided_flow_step.sde": Op(build_sde, LATENTS[1:5], GPU_LATENTS[:3]),
}
