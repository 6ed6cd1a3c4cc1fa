"""philox_normal: the noise of whole samples from their keys. The plain run is the same formula, op by op."""

from __future__ import annotations

import torch

from bench.case import PLAIN, Case, Op, Run, Shape, count_bytes, list_impls
from bench.inputs import GPU_LATENTS, LATENTS, Flow
from realign_kernels import philox_normal
from realign_kernels.philox_normal.reference import philox_normal_reference


def build(shape: Shape, device: torch.device) -> Case:
    """Equal samples, each with its key."""
    flow = Flow.build(shape, device)
    num_tokens, num_channels = flow.sample_LC.shape

    def run(impl: str) -> Run:
        return lambda: philox_normal(flow.keys, flow.cu_seqlens, num_tokens, num_channels, impl=impl)

    keys = (flow.keys.key_B, flow.keys.step_B)
    runs = {PLAIN: lambda: philox_normal_reference(*keys, flow.cu_seqlens, num_channels)}
    paths = [impl for impl in list_impls(["cpp", "triton"], device) if impl != "reference"]
    return Case(runs | {impl: run(impl) for impl in paths}, count_bytes(flow.sample_LC), relative_error=0.0)


OPS = {"philox_normal": Op(build, LATENTS[:3], GPU_LATENTS[:3])}
