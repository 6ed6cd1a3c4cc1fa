"""Triton path of `guided_velocity`: the kernels of `guided_flow_step` without the step."""

from __future__ import annotations

import torch
from torch import Tensor

from realign_kernels.guided_flow_step.triton import GUIDANCE_SCHEMA, run_flow


@torch.library.custom_op(
    "realign_kernels::guided_velocity_triton",
    mutates_args=(),
    schema=f"(ScalarType out_dtype, {GUIDANCE_SCHEMA}) -> Tensor",
)
def guided_velocity_triton(
    out_dtype: torch.dtype,
    cond: Tensor,
    text_uncond: Tensor | None,
    image_uncond: Tensor | None,
    cu_seqlens: Tensor,
    text_scale: Tensor,
    image_scale: Tensor | None,
    renorm: Tensor | None,
    renorm_min: Tensor | None,
    common_renorm: int = 0,
) -> Tensor:
    """`guided_velocity` in one launch or two."""
    numbers = dict(locals())
    fields = {name: numbers[name] for name in ("cond", "text_uncond", "image_uncond")}
    out_LC = torch.empty(cond.shape, dtype=out_dtype, device=cond.device)
    run_flow(out_LC, {**fields, "sample": None, "noise": None}, numbers)
    return out_LC


@guided_velocity_triton.register_fake
def _(out_dtype, cond, *rest, **more):
    return torch.empty(cond.shape, dtype=out_dtype, device=cond.device)
