"""flow_step: an Euler step; and a noisy step with its log-prob."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import baselines
from bench.case import PLAIN, Case, Op, Run, Shape, allow_error, count_bytes, list_impls
from bench.inputs import GPU_LATENTS, LATENTS, SDE, STEP, Flow
from realign_kernels import flow_step

PATHS = ["cpp", "triton"]


def build(shape: Shape, device: torch.device) -> Case:
    """Equal samples under one velocity; diffusers' scheduler does the same with its own checks."""
    flow = Flow.build(shape, device)

    def run(impl: str) -> Run:
        return lambda: flow_step(flow.sample_LC, flow.cond_LC, flow.cu_seqlens, flow.euler, impl=impl)

    runs = {PLAIN: lambda: baselines.plain_flow_step(flow.sample_LC, flow.cond_LC, STEP)}
    if scheduler_step := _find_scheduler_step(flow):
        runs["diffusers"] = scheduler_step
    runs |= {impl: run(impl) for impl in list_impls(PATHS, device)}
    return Case(runs, count_bytes(flow.sample_LC, flow.cond_LC, flow.sample_LC), allow_error(shape))


def _find_scheduler_step(flow: Flow) -> Run | None:
    """diffusers' Euler step over an interval of the same length, or None where it is not installed."""
    diffusers = baselines.find_library("diffusers")
    if diffusers is None:
        return None
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 1.0 - STEP], device=flow.sample_LC.device)
    first = scheduler.timesteps[0]

    def run() -> Tensor:
        scheduler._step_index = 0
        return scheduler.step(flow.cond_LC, first, flow.sample_LC, return_dict=False)[0]

    return run


def build_sde(shape: Shape, device: torch.device) -> Case:
    """Given noise, and the log-prob of each sample."""
    flow = Flow.build(shape, device)
    batch, constant = shape.sizes["B"], 0.98

    def plain() -> tuple[Tensor, Tensor]:
        mean_LC = baselines.plain_sde_mean(flow.sample_LC, flow.cond_LC, SDE["a"], SDE["b"])
        next_LC = mean_LC + SDE["std"] * flow.noise_LC
        return next_LC, baselines.plain_logprob(next_LC, mean_LC, batch, SDE["std"], constant)

    def run(impl: str) -> Run:
        fields = (flow.sample_LC, flow.cond_LC, flow.cu_seqlens)
        return lambda: flow_step(*fields, flow.sde, flow.noise_LC, flow.logprob, impl=impl)

    runs = {PLAIN: plain} | {impl: run(impl) for impl in list_impls(PATHS, device)}
    num_bytes = count_bytes(flow.sample_LC, flow.cond_LC, flow.noise_LC, flow.sample_LC)
    return Case(runs, num_bytes, allow_error(shape))


OPS = {
    "flow_step": Op(build, LATENTS, GPU_LATENTS),
    "flow_step.sde": Op(build_sde, LATENTS[1:5], GPU_LATENTS[:3]),
}
