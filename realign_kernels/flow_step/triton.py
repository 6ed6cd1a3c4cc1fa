"""Triton path of `flow_step`: the kernel of `guided_flow_step` without guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from realign_kernels.guided_flow_step.triton import STEP_SCHEMA, run_flow


@torch.library.custom_op(
    "realign_kernels::flow_step_triton",
    mutates_args=(),
    schema=f"(Tensor sample, Tensor velocity, Tensor cu_seqlens, {STEP_SCHEMA}) -> (Tensor, Tensor)",
)
def flow_step_triton(
    sample: Tensor,
    velocity: Tensor,
    cu_seqlens: Tensor,
    a: Tensor,
    b: Tensor,
    std: Tensor | None,
    noise: Tensor | None,
    noise_key: Tensor | None,
    noise_step: Tensor | None,
    logprob_weight: Tensor | None,
    logprob_constant: Tensor | None,
    reduce_sum: bool,
) -> tuple[Tensor, Tensor]:
    """`flow_step` in one launch."""
    numbers = dict(locals())
    fields = {"cond": velocity, "text_uncond": None, "image_uncond": None, "sample": sample, "noise": noise}
    out_LC = torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
    return out_LC, run_flow(out_LC, fields, numbers)


@flow_step_triton.register_fake
def _(sample, velocity, cu_seqlens, a, b, std, noise, noise_key, noise_step, logprob_weight, *rest):
    num_samples = 0 if logprob_weight is None else logprob_weight.shape[0]
    logprob_B = torch.empty(num_samples, device=sample.device)
    return torch.empty(sample.shape, dtype=sample.dtype, device=sample.device), logprob_B
