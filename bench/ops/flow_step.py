"""flow_step: one Euler step, the same for all samples."""

from __future__ import annotations

import torch

from bench import baselines
from bench.case import PLAIN, Case, Op, Run, Shape, allow_error, count_bytes, list_impls
from bench.inputs import GPU_LATENTS, LATENTS, STEP, Flow
from realign_kernels import flow_step


def build(shape: Shape, device: torch.device) -> Case:
    """Equal samples under one velocity."""
    flow = Flow.build(shape, device)

    def run(impl: str) -> Run:
        return lambda: flow_step(flow.sample_LC, flow.cond_LC, flow.cu_seqlens, flow.a_B, flow.b_B, impl=impl)

    runs = {PLAIN: lambda: baselines.plain_flow_step(flow.sample_LC, flow.cond_LC, STEP)}
    runs |= {impl: run(impl) for impl in list_impls(["cpp"], device)}
    num_bytes = count_bytes(flow.sample_LC, flow.cond_LC, flow.sample_LC)
    return Case(runs, num_bytes, allow_error(shape))


OPS = {"flow_step": Op(build, LATENTS, GPU_LATENTS)}
