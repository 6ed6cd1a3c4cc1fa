"""Signature, formula, checks and dispatch of `guided_flow_step`. L packed tokens, C channels, B samples."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from realign_kernels import native
from realign_kernels.dispatch import choose_impl
from realign_kernels.flow_step.api import check_step
from realign_kernels.guided_flow_step.reference import guided_flow_step_reference
from realign_kernels.guided_velocity.api import check_guidance


def guided_flow_step(
    sample_LC: Tensor,
    cond_LC: Tensor,
    text_uncond_LC: Tensor | None,
    image_uncond_LC: Tensor | None,
    cu_seqlens: Tensor,
    text_scale_B: Tensor,
    image_scale_B: Tensor | None,
    a_B: Tensor,
    b_B: Tensor,
    std_B: Tensor | None = None,
    noise_LC: Tensor | None = None,
    renorm: str | Sequence[str] = "global",
    renorm_min_B: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Guidance and sampler step in one: `flow_step(sample, guided_velocity(cond, text, image))`.

    The guided velocity stays in float32 in between, whatever the dtype of the branches.

    Args:
        sample_LC, std_B, noise_LC, a_B, b_B: as in `flow_step`.
        cond_LC, text_uncond_LC, image_uncond_LC, text_scale_B, image_scale_B, renorm, renorm_min_B: as in
            `guided_velocity`.
        cu_seqlens: int32 [B+1], offsets of the samples.
        impl: `"auto"` (table in `dispatch.py`), `"reference"` or `"cpp"`.

    Returns: [L, C] in the dtype of `sample_LC`.
    Raises: ValueError naming the argument and its value.
    """
    branches = (cond_LC, text_uncond_LC, image_uncond_LC)
    scales = (cu_seqlens, text_scale_B, image_scale_B)
    step = (a_B, b_B, std_B, noise_LC)
    renorms = check_guidance(*branches, *scales, renorm, renorm_min_B)
    check_step(sample_LC, "cond_LC", cond_LC, cu_seqlens, *step)
    if choose_impl("guided_flow_step", impl, (sample_LC, *branches, noise_LC), {"cpp": False}) == "cpp":
        codes = [native.RENORM_CODES[mode] for mode in renorms]
        return native.guided_flow_step_cpp(sample_LC, *branches, *scales, *step, codes, renorm_min_B)
    return guided_flow_step_reference(sample_LC, *branches, *scales, *step, renorms, renorm_min_B)
