"""Signature, formula, checks and dispatch of `flow_step`. L packed tokens, C channels, B samples."""

from __future__ import annotations

from torch import Tensor

from realign_kernels import native
from realign_kernels.checks import check_cu_seqlens, check_first, check_like, check_per_sample
from realign_kernels.dispatch import choose_impl
from realign_kernels.flow_step.reference import flow_step_reference


def flow_step(
    sample_LC: Tensor,
    velocity_LC: Tensor,
    cu_seqlens: Tensor,
    a_B: Tensor,
    b_B: Tensor,
    std_B: Tensor | None = None,
    noise_LC: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """One sampler step on packed samples: `(a * x + b * v) + std * noise`.

    The ODE's Euler step is a = 1, b = -(t - t_next), no noise; Flow-GRPO's SDE, DanceGRPO's and CPS are other
    numbers in the same places.

    Args:
        sample_LC: x; float32, bfloat16, float16 or float64; the arithmetic is float32 or wider.
        velocity_LC: v, same shape; its dtype may differ.
        cu_seqlens: int32 [B+1], offsets of the samples.
        a_B, b_B: float32 [B].
        std_B, noise_LC: float32 [B] >= 0 and noise like `sample_LC`; both or neither.
        impl: `"auto"` (table in `dispatch.py`), `"reference"` or `"cpp"`.

    Returns: [L, C] in the dtype of `sample_LC`.
    Raises: ValueError naming the argument and its value.
    Source: Flow-GRPO, arXiv 2505.05470, eq. 9, in the form the schedule gives it.
    """
    check_first("velocity_LC", velocity_LC)
    check_step(sample_LC, "velocity_LC", velocity_LC, cu_seqlens, a_B, b_B, std_B, noise_LC)
    run = flow_step_reference
    if choose_impl("flow_step", impl, (sample_LC, velocity_LC, noise_LC), {"cpp": False}) == "cpp":
        run = native.flow_step_cpp
    return run(sample_LC, velocity_LC, cu_seqlens, a_B, b_B, std_B, noise_LC)


def check_step(
    sample_LC: Tensor,
    velocity_name: str,
    velocity_LC: Tensor,
    cu_seqlens: Tensor,
    a_B: Tensor,
    b_B: Tensor,
    std_B: Tensor | None,
    noise_LC: Tensor | None,
) -> None:
    """Raise ValueError for step arguments that do not fit a checked velocity."""
    check_like("sample_LC", sample_LC, velocity_name, velocity_LC, same_dtype=False)
    num_samples = check_cu_seqlens(cu_seqlens, sample_LC)
    check_per_sample("a_B", a_B, num_samples, sample_LC)
    check_per_sample("b_B", b_B, num_samples, sample_LC)
    if (std_B is None) != (noise_LC is None):
        missing, given = ("std_B", "noise_LC") if std_B is None else ("noise_LC", "std_B")
        raise ValueError(
            f"{missing} is None and {given} is not: pass both for a noisy step, neither for an ODE step"
        )
    if std_B is not None:
        check_per_sample("std_B", std_B, num_samples, sample_LC, minimum=0.0)
        check_like("noise_LC", noise_LC, "sample_LC", sample_LC)
