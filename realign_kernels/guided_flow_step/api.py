"""Signature, formula, checks and dispatch of `guided_flow_step`. L packed tokens, C channels, B samples."""

from __future__ import annotations

from torch import Tensor

from realign_kernels import native
from realign_kernels.arguments import Guidance, LogProbCoefficients, StepCoefficients
from realign_kernels.dispatch import choose_impl
from realign_kernels.flow_step.api import check_step, name_step
from realign_kernels.flow_step.reference import Noise
from realign_kernels.guided_flow_step import cuda
from realign_kernels.guided_flow_step.reference import guided_flow_step_reference
from realign_kernels.guided_velocity.api import (
    Velocities,
    check_guidance,
    encode_renorm,
    name_fields,
    name_guidance,
)


def guided_flow_step(
    sample_LC: Tensor,
    velocities: Velocities,
    cu_seqlens: Tensor,
    guidance: Guidance,
    coefficients: StepCoefficients,
    noise: Noise = None,
    logprob: LogProbCoefficients | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Guidance and sampler step in one: `flow_step(sample, guided_velocity(velocities))`.

    The fused rectified-flow sampling step. The guided velocity stays in float32 in between, whatever the
    dtype of the velocities, and is never written to memory.

    Args:
        sample_LC, coefficients, noise, logprob: as in `flow_step`.
        velocities, guidance: as in `guided_velocity`.
        cu_seqlens: int32 [B+1], offsets of the samples.
        impl: `"auto"` (table in `dispatch.py`; `"cuda"` where `cuda.py` says it was measured to be faster),
            `"reference"`, `"cpp"`, `"triton"` or `"cuda"`, for GPUs with thread-block clusters.

    Returns: [L, C] in the dtype of `sample_LC`; with `logprob`, that and the log-probs, float32 [B].
    Raises: ValueError naming the argument and its value.
    """
    fields = check_guidance(velocities, cu_seqlens, guidance)
    check_step("velocities[0]", fields[0], sample_LC, cu_seqlens, coefficients, noise, logprob)
    tensors = (sample_LC, *fields, noise if isinstance(noise, Tensor) else None)
    path = choose_impl("guided_flow_step", impl, tensors, {"cpp": False, "triton": False, "cuda": False})
    if impl == "auto" and path == "triton" and cuda.is_faster(sample_LC, cu_seqlens):
        path = "cuda"
    if path == "reference":
        step = (coefficients, noise, logprob)
        return guided_flow_step_reference(
            sample_LC, fields, cu_seqlens, encode_renorm(guidance, cu_seqlens), *step
        )
    if path == "triton":
        from realign_kernels.guided_flow_step.triton import guided_flow_step_triton as run
    else:
        run = cuda.guided_flow_step_cuda if path == "cuda" else native.guided_flow_step_cpp
    names = (
        name_fields(fields) | name_guidance(guidance, cu_seqlens) | name_step(coefficients, noise, logprob)
    )
    next_LC, logprob_B = run(sample=sample_LC, cu_seqlens=cu_seqlens, **names)
    return next_LC if logprob is None else (next_LC, logprob_B)
