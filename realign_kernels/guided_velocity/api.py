"""Signature, formula, checks and dispatch of `guided_velocity`. L packed tokens, C channels, B samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from realign_kernels import native
from realign_kernels.checks import (
    can_read_values,
    check_cu_seqlens,
    check_first,
    check_like,
    check_per_sample,
    check_renorm,
)
from realign_kernels.dispatch import choose_impl
from realign_kernels.guided_velocity.reference import guided_velocity_reference


def guided_velocity(
    cond_LC: Tensor,
    text_uncond_LC: Tensor | None,
    image_uncond_LC: Tensor | None,
    cu_seqlens: Tensor,
    text_scale_B: Tensor,
    image_scale_B: Tensor | None,
    renorm: str | Sequence[str] = "global",
    renorm_min_B: Tensor | None = None,
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
    `cond_LC` passes through, and the other two are not read there.

    Args:
        cond_LC: conditional velocities; float32, bfloat16, float16 or float64; arithmetic is float32 or more.
        text_uncond_LC, image_uncond_LC: the same shape and dtype, or None where no sample uses them.
        cu_seqlens: int32 [B+1], offsets of the samples.
        text_scale_B, image_scale_B: float32 [B]; 1 says "no guidance now". image_scale_B None is 1 for all.
        renorm: one mode for all, or one per sample.
        renorm_min_B: float32 [B], least shrinking factor; None is 0 for all.
        impl: `"auto"` (table in `dispatch.py`), `"reference"` or `"cpp"`.

    Returns: [L, C] in the dtype of `cond_LC`.
    Raises: ValueError naming the argument and its value.
    Source: BAGEL, arXiv 2505.14683, `Bagel._forward_flow`, whose global norm is right for one sample only.
    """
    guidance = (cond_LC, text_uncond_LC, image_uncond_LC, cu_seqlens, text_scale_B, image_scale_B)
    renorms = check_guidance(*guidance, renorm, renorm_min_B)
    if choose_impl("guided_velocity", impl, guidance[:3], {"cpp": False}) == "cpp":
        codes = [native.RENORM_CODES[mode] for mode in renorms]
        return native.guided_velocity_cpp(*guidance, codes, renorm_min_B)
    return guided_velocity_reference(*guidance, renorms, renorm_min_B)


def check_guidance(
    cond_LC: Tensor,
    text_uncond_LC: Tensor | None,
    image_uncond_LC: Tensor | None,
    cu_seqlens: Tensor,
    text_scale_B: Tensor,
    image_scale_B: Tensor | None,
    renorm: str | Sequence[str],
    renorm_min_B: Tensor | None,
) -> tuple[str, ...]:
    """Raise ValueError for guidance arguments that do not fit. Returns the renorm mode of each sample."""
    check_first("cond_LC", cond_LC)
    num_samples = check_cu_seqlens(cu_seqlens, cond_LC)
    check_per_sample("text_scale_B", text_scale_B, num_samples, cond_LC)
    if image_scale_B is not None:
        check_per_sample("image_scale_B", image_scale_B, num_samples, cond_LC)
    if renorm_min_B is not None:
        check_per_sample("renorm_min_B", renorm_min_B, num_samples, cond_LC, minimum=0.0)
    _check_branch("text_uncond_LC", text_uncond_LC, cond_LC, "text_scale_B", text_scale_B)
    _check_branch("image_uncond_LC", image_uncond_LC, cond_LC, "image_scale_B", image_scale_B)
    return check_renorm(renorm, num_samples)


def _check_branch(
    name: str, branch_LC: Tensor | None, cond_LC: Tensor, scale_name: str, scale_B: Tensor | None
) -> None:
    """A branch fits `cond_LC`; a branch that is None is not asked for by any scale."""
    if branch_LC is not None:
        check_like(name, branch_LC, "cond_LC", cond_LC)
    elif scale_B is not None and can_read_values(scale_B) and max(scale_B.tolist(), default=1.0) > 1.0:
        raise ValueError(
            f"{name} is None and {scale_name} is {scale_B.tolist()}: pass the branch, or scales of 1"
        )
