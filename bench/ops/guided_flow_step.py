"""guided_flow_step: both guidances, the global renorm, one Euler step."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import baselines
from bench.case import PLAIN, Case, Op, Run, Shape, allow_error, count_bytes, list_impls
from bench.inputs import GPU_LATENTS, IMAGE_SCALE, LATENTS, STEP, TEXT_SCALE, Flow
from realign_kernels import guided_flow_step


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
        numbers = (flow.cu_seqlens, flow.text_scale_B, flow.image_scale_B, flow.a_B, flow.b_B)
        return lambda: guided_flow_step(flow.sample_LC, *flow.branches, *numbers, impl=impl)

    runs = {PLAIN: plain} | {impl: run(impl) for impl in list_impls(["cpp"], device)}
    num_bytes = count_bytes(flow.sample_LC, *flow.branches, flow.sample_LC)
    return Case(runs, num_bytes, allow_error(shape), compiled=lambda compile_it: compile_it(batched))


OPS = {"guided_flow_step": Op(build, LATENTS, GPU_LATENTS)}
