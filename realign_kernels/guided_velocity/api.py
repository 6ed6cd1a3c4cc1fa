"""Signature, formula, checks and dispatch of `guided_velocity`. L packed tokens, C channels, B samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.arguments import RENORMS, Guidance
from realign_kernels.checks import (
    can_read_values,
    check_choice,
    check_cu_seqlens,
    check_dtype,
    check_like,
    check_packed,
    check_per_sample,
)
from realign_kernels.dispatch import choose_impl
from realign_kernels.guided_velocity.reference import guided_velocity_reference

Velocities = Sequence[Tensor | None]


def guided_velocity(
    velocities: Velocities,
    cu_seqlens: Tensor,
    guidance: Guidance,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Text and image guidance of packed velocities, each sample by itself.

    With v, t, i the conditional, text- and image-unconditional velocity of one sample:

        g = t + text_scale * (v - t)
        g = i + image_scale * (g - i)                                    if image_scale > 1
        g = g * clamp(|v| / (|g| + 1e-8), renorm_min, 1)                 unless renorm is "none"

    The norms are over the whole sample (`"global"`) or over each token's channels (`"channel"`).
    `"text_channel"` scales each token after the text line and before the image line instead. A sample with
    text_scale <= 1 is not guided at all (BAGEL's image guidance acts only together with text guidance): its
    conditional velocity passes through, and the other two are not read there.

    Args:
        velocities: one to three [L, C] tensors of one dtype: conditional, text-unconditional,
            image-unconditional; those that no sample uses may be None or left out. float32, bfloat16, float16
            or float64; arithmetic is float32 or wider.
        cu_seqlens: int32 [B+1], offsets of the samples.
        guidance: scales and renorm of each sample.
        dtype: of the result; None is that of the velocities. float32 keeps what `guided_flow_step` has
            inside.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: [L, C]. Differentiable in the velocities.
    Raises: ValueError naming the argument and its value.
    Source: BAGEL, arXiv 2505.14683, `Bagel._forward_flow`, whose global norm is right for one sample only.
    """
    fields = check_guidance(velocities, cu_seqlens, guidance)
    dtype = dtype or fields[0].dtype
    check_dtype("dtype", dtype)
    path = choose_impl("guided_velocity", impl, fields, {"cpp": True, "triton": True})
    if path == "reference":
        return guided_velocity_reference(*fields, cu_seqlens, encode_renorm(guidance, cu_seqlens), dtype)
    return _GuidedVelocity.apply(path, cu_seqlens, guidance, dtype, *fields)


class _GuidedVelocity(torch.autograd.Function):
    """A compiled forward; the backward goes through the definition, computed again."""

    @staticmethod
    def forward(ctx, path: str, cu_seqlens: Tensor, guidance: Guidance, dtype: torch.dtype, *fields):
        ctx.guidance, ctx.dtype = guidance, dtype
        ctx.save_for_backward(cu_seqlens, *fields)
        if path == "triton":
            from realign_kernels.guided_velocity.triton import guided_velocity_triton as run
        else:
            run = native.guided_velocity_cpp
        names = name_fields(fields) | name_guidance(guidance, cu_seqlens)
        return run(**names, cu_seqlens=cu_seqlens, out_dtype=dtype)

    @staticmethod
    def backward(ctx, grad_LC: Tensor):
        cu_seqlens, *fields = ctx.saved_tensors
        wanted = [
            field is not None and need for field, need in zip(fields, ctx.needs_input_grad[4:], strict=True)
        ]
        leaves = [
            None if field is None else field.detach().requires_grad_(need)
            for field, need in zip(fields, wanted, strict=True)
        ]
        with torch.enable_grad():
            guidance = encode_renorm(ctx.guidance, cu_seqlens)
            out_LC = guided_velocity_reference(*leaves, cu_seqlens, guidance, ctx.dtype)
        inputs = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
        grads = iter(torch.autograd.grad(out_LC, inputs, grad_LC, allow_unused=True))
        return (None, None, None, None, *(next(grads) if need else None for need in wanted))


def check_guidance(
    velocities: Velocities, cu_seqlens: Tensor, guidance: Guidance
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Raise ValueError for guidance that does not fit. Returns the three velocities, None where absent."""
    if not 1 <= len(velocities) <= 3 or velocities[0] is None:
        raise ValueError(
            f"velocities is {[None if v is None else tuple(v.shape) for v in velocities]}: must be the "
            "conditional, then the text- and the image-unconditional velocity where they are used"
        )
    cond_LC, text_LC, image_LC = (*velocities, None, None)[:3]
    check_packed("velocities[0]", cond_LC)
    num_samples = check_cu_seqlens(cu_seqlens, cond_LC)
    check_per_sample("guidance.text_scale_B", guidance.text_scale_B, num_samples, cond_LC)
    if guidance.image_scale_B is not None:
        check_per_sample("guidance.image_scale_B", guidance.image_scale_B, num_samples, cond_LC)
    if guidance.renorm_min_B is not None:
        check_per_sample("guidance.renorm_min_B", guidance.renorm_min_B, num_samples, cond_LC, minimum=0.0)
    _check_branch("velocities[1]", text_LC, cond_LC, "guidance.text_scale_B", guidance.text_scale_B)
    _check_branch("velocities[2]", image_LC, cond_LC, "guidance.image_scale_B", guidance.image_scale_B)
    _check_renorm(guidance.renorm, num_samples, cond_LC)
    return cond_LC, text_LC, image_LC


def encode_renorm(guidance: Guidance, cu_seqlens: Tensor) -> Guidance:
    """The guidance with its renorm as an int32 [B] tensor on the device of `cu_seqlens`."""
    if isinstance(guidance.renorm, Tensor):
        return guidance
    modes = guidance.renorm
    if isinstance(modes, str):
        modes = [modes] * (cu_seqlens.numel() - 1)
    codes = [RENORMS.index(mode) for mode in modes]
    return replace(guidance, renorm=torch.tensor(codes, dtype=torch.int32, device=cu_seqlens.device))


def name_fields(fields: Velocities) -> dict[str, Tensor | None]:
    """The velocities as the compiled ops call them."""
    cond_LC, text_LC, image_LC = fields
    return {"cond": cond_LC, "text_uncond": text_LC, "image_uncond": image_LC}


def name_guidance(guidance: Guidance, cu_seqlens: Tensor) -> dict[str, Tensor | int | None]:
    """The guidance as the compiled ops call it. A mode common to all is told as a constant."""
    numbers = {
        "text_scale": guidance.text_scale_B,
        "image_scale": guidance.image_scale_B,
        "renorm_min": guidance.renorm_min_B,
    }
    if isinstance(guidance.renorm, str):
        return {**numbers, "renorm": None, "common_renorm": RENORMS.index(guidance.renorm)}
    numbers["renorm"] = encode_renorm(guidance, cu_seqlens).renorm
    return numbers


def _check_branch(
    name: str, branch_LC: Tensor | None, cond_LC: Tensor, scale_name: str, scale_B: Tensor | None
) -> None:
    """A branch fits the conditional one; a branch that is None is not asked for by any scale."""
    if branch_LC is not None:
        check_like(name, branch_LC, "velocities[0]", cond_LC)
    elif scale_B is not None and can_read_values(scale_B) and max(scale_B.tolist(), default=1.0) > 1.0:
        raise ValueError(
            f"{name} is None and {scale_name} is {scale_B.tolist()}: pass the branch, or scales of 1"
        )


def _check_renorm(renorm: str | Sequence[str] | Tensor, num_samples: int, first: Tensor) -> None:
    if isinstance(renorm, str):
        check_choice("guidance.renorm", renorm, RENORMS)
        return
    if isinstance(renorm, Tensor):
        _check_renorm_codes(renorm, num_samples, first)
        return
    if len(renorm) != num_samples:
        raise ValueError(
            f"guidance.renorm has {len(renorm)} modes: must be one mode, or one per sample ({num_samples})"
        )
    for sample, mode in enumerate(renorm):
        check_choice(f"guidance.renorm[{sample}]", mode, RENORMS)


def _check_renorm_codes(renorm_B: Tensor, num_samples: int, first: Tensor) -> None:
    if renorm_B.dtype != torch.int32 or renorm_B.shape != (num_samples,) or renorm_B.device != first.device:
        raise ValueError(
            f"guidance.renorm is {renorm_B.dtype} {tuple(renorm_B.shape)} on {renorm_B.device}: "
            f"must be int32 [{num_samples}] on {first.device}"
        )
    if can_read_values(renorm_B):
        for sample, code in enumerate(renorm_B.tolist()):
            if not 0 <= code < len(RENORMS):
                raise ValueError(f"guidance.renorm[{sample}] is {code}: must be from 0 to {len(RENORMS) - 1}")
