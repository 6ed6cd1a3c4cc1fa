"""guided_velocity: both guidances and the global renorm."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import baselines
from bench.case import PLAIN, Case, Op, Run, Shape, allow_error, count_bytes, list_impls
from bench.inputs import GPU_LATENTS, IMAGE_SCALE, LATENTS, TEXT_SCALE, Flow
from realign_kernels import guided_velocity


def build(shape: Shape, device: torch.device) -> Case:
    """Equal samples with three branches."""
    flow = Flow.build(shape, device)
    scales = (TEXT_SCALE, IMAGE_SCALE)

    def batched() -> Tensor:
        return baselines.batched_guided_velocities(*flow.branches, shape.sizes["B"], *scales)

    def run(impl: str) -> Run:
        return lambda: guided_velocity(flow.branches, flow.cu_seqlens, flow.guidance, impl=impl)

    runs = {PLAIN: lambda: baselines.plain_guided_velocities(*flow.branches, flow.offsets, *scales)}
    runs |= {impl: run(impl) for impl in list_impls(["cpp", "triton"], device)}
    # Plain torch rounds to bfloat16 after every operation, and guidance enlarges what was rounded before.
    error = allow_error(shape) if shape.dtype == torch.float32 else 2e-2
    return Case(
        runs,
        num_bytes=count_bytes(*flow.branches, flow.cond_LC),
        relative_error=error,
        compiled=lambda compile_it: compile_it(batched),
    )


OPS = {"guided_velocity": Op(build, LATENTS, GPU_LATENTS)}
