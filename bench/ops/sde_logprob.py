"""sde_logprob: log-probs of stored steps; with a backward, their gradient to the velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import baselines
from bench.case import PLAIN, Case, Op, Run, Shape, allow_error, count_bytes, list_impls
from bench.inputs import GPU_LATENTS, LATENTS, SDE, Flow
from realign_kernels import sde_logprob

CONSTANT = 0.98
PATHS = ["cpp", "triton"]


def plain_logprob(flow: Flow, velocity_LC: Tensor, num_samples: int) -> Tensor:
    """Flow-GRPO's, op by op. The noise field stands for the stored next sample."""
    mean_LC = baselines.plain_sde_mean(flow.sample_LC, velocity_LC, SDE["a"], SDE["b"])
    return baselines.plain_logprob(flow.noise_LC, mean_LC, num_samples, SDE["std"], CONSTANT)


def our_logprob(flow: Flow, velocity_LC: Tensor, impl: str) -> Tensor:
    """The op on the same numbers."""
    step = (flow.sample_LC, flow.noise_LC)
    return sde_logprob(step, velocity_LC, flow.cu_seqlens, flow.sde, flow.logprob, impl=impl)


def build(shape: Shape, device: torch.device) -> Case:
    """The log-probs alone."""
    flow = Flow.build(shape, device)

    def run(impl: str) -> Run:
        return lambda: our_logprob(flow, flow.cond_LC, impl)

    runs = {PLAIN: lambda: plain_logprob(flow, flow.cond_LC, shape.sizes["B"])}
    runs |= {impl: run(impl) for impl in list_impls(PATHS, device)}
    return Case(runs, count_bytes(flow.sample_LC, flow.cond_LC, flow.noise_LC), allow_error(shape))


def build_backward(shape: Shape, device: torch.device) -> Case:
    """The log-probs, and the gradient of their sum."""
    flow = Flow.build(shape, device)
    velocity_LC = flow.cond_LC.clone().requires_grad_()

    def differentiate(logprob_of) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(logprob_of(velocity_LC).sum(), velocity_LC)[0]

    def run(impl: str) -> Run:
        return lambda: differentiate(lambda velocity_LC: our_logprob(flow, velocity_LC, impl))

    def plain(velocity_LC: Tensor) -> Tensor:
        return plain_logprob(flow, velocity_LC, shape.sizes["B"])

    def compiled(compile_it) -> Run:
        forward = compile_it(plain)
        return lambda: differentiate(forward)

    runs = {PLAIN: lambda: differentiate(plain)}
    runs |= {impl: run(impl) for impl in list_impls(PATHS, device)}
    fields = (flow.sample_LC, flow.cond_LC, flow.noise_LC)
    return Case(runs, count_bytes(*fields, *fields, flow.cond_LC), allow_error(shape), compiled=compiled)


OPS = {
    "sde_logprob": Op(build, LATENTS[1:5], GPU_LATENTS[:3]),
    "sde_logprob.backward": Op(build_backward, LATENTS[1:5], GPU_LATENTS[:3]),
}
