"""Signature, formula, checks and dispatch of `flow_step`. L packed tokens, C channels, B samples."""

from __future__ import annotations

from torch import Tensor

from realign_kernels import native
from realign_kernels.arguments import REDUCTIONS, LogProbCoefficients, NoiseKeys, StepCoefficients
from realign_kernels.checks import (
    check_choice,
    check_cu_seqlens,
    check_like,
    check_packed,
    check_per_sample,
)
from realign_kernels.dispatch import choose_impl
from realign_kernels.flow_step.reference import Noise, flow_step_reference
from realign_kernels.philox_normal.api import check_noise_keys


def flow_step(
    sample_LC: Tensor,
    velocity_LC: Tensor,
    cu_seqlens: Tensor,
    coefficients: StepCoefficients,
    noise: Noise = None,
    logprob: LogProbCoefficients | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One sampler step on packed samples, `x_next = (a * x + b * v) + std * noise`; its log-prob if asked.

    The ODE's Euler step is a = 1, b = -(t - t_next), no noise; Flow-GRPO's SDE, DanceGRPO's and CPS are other
    numbers in the same places. The log-prob is of the `x_next` that is returned, in its dtype:
    `constant - weight * reduced((x_next - (a * x + b * v)) ** 2)`. `sde_logprob` gives it again, bit for bit.

    Args:
        sample_LC: x; float32, bfloat16, float16 or float64; the arithmetic is float32 or wider.
        velocity_LC: v, same shape; its dtype may differ.
        cu_seqlens: int32 [B+1], offsets of the samples.
        coefficients: a, b, std of each sample.
        noise: numbers like `sample_LC`; or the keys to make them from inside (`philox_normal`); None where
            std is.
        logprob: the numbers of the log-prob; None where it is not wanted.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: [L, C] in the dtype of `sample_LC`; with `logprob`, that and the log-probs, float32 [B].
    Raises: ValueError naming the argument and its value.
    Source: Flow-GRPO, arXiv 2505.05470, eq. 9, in the form the schedule gives it.
    """
    check_packed("velocity_LC", velocity_LC)
    check_cu_seqlens(cu_seqlens, velocity_LC)
    check_step("velocity_LC", velocity_LC, sample_LC, cu_seqlens, coefficients, noise, logprob)
    tensors = (sample_LC, velocity_LC, noise if isinstance(noise, Tensor) else None)
    path = choose_impl("flow_step", impl, tensors, {"cpp": False, "triton": False})
    if path == "reference":
        return flow_step_reference(sample_LC, velocity_LC, cu_seqlens, coefficients, noise, logprob)
    if path == "triton":
        from realign_kernels.flow_step.triton import flow_step_triton as run
    else:
        run = native.flow_step_cpp
    names = name_step(coefficients, noise, logprob)
    next_LC, logprob_B = run(sample=sample_LC, velocity=velocity_LC, cu_seqlens=cu_seqlens, **names)
    return next_LC if logprob is None else (next_LC, logprob_B)


def check_step(
    velocity_name: str,
    velocity_LC: Tensor,
    sample_LC: Tensor,
    cu_seqlens: Tensor,
    coefficients: StepCoefficients,
    noise: Noise,
    logprob: LogProbCoefficients | None,
) -> None:
    """Raise ValueError for step arguments that do not fit a checked velocity and its offsets."""
    check_like("sample_LC", sample_LC, velocity_name, velocity_LC, same_dtype=False)
    num_samples = cu_seqlens.shape[0] - 1
    check_coefficients(coefficients, num_samples, sample_LC)
    if (coefficients.std_B is None) != (noise is None):
        names = ("coefficients.std_B", "noise")
        missing, given = names if noise is not None else names[::-1]
        raise ValueError(
            f"{missing} is None and {given} is not: pass both for a noisy step, neither for an ODE step"
        )
    if isinstance(noise, NoiseKeys):
        check_noise_keys(noise, num_samples, sample_LC)
    elif noise is not None:
        check_like("noise", noise, "sample_LC", sample_LC)
    if logprob is not None:
        check_logprob(logprob, num_samples, sample_LC)


def check_coefficients(coefficients: StepCoefficients, num_samples: int, first: Tensor) -> None:
    """Raise ValueError unless a step has finite numbers, one per sample, and no negative deviation."""
    check_per_sample("coefficients.a_B", coefficients.a_B, num_samples, first)
    check_per_sample("coefficients.b_B", coefficients.b_B, num_samples, first)
    if coefficients.std_B is not None:
        check_per_sample("coefficients.std_B", coefficients.std_B, num_samples, first, minimum=0.0)


def check_logprob(logprob: LogProbCoefficients, num_samples: int, first: Tensor) -> None:
    """Raise ValueError unless the numbers of a log-prob are finite, one per sample."""
    check_per_sample("logprob.weight_B", logprob.weight_B, num_samples, first, minimum=0.0)
    check_per_sample("logprob.constant_B", logprob.constant_B, num_samples, first)
    check_choice("logprob.reduction", logprob.reduction, REDUCTIONS)


def name_step(
    coefficients: StepCoefficients, noise: Noise, logprob: LogProbCoefficients | None
) -> dict[str, Tensor | bool | None]:
    """The arguments of a step as the compiled ops call them."""
    has_keys = isinstance(noise, NoiseKeys)
    return {
        "a": coefficients.a_B,
        "b": coefficients.b_B,
        "std": coefficients.std_B,
        "noise": None if has_keys else noise,
        "noise_key": noise.key_B if has_keys else None,
        "noise_step": noise.step_B if has_keys else None,
        "logprob_weight": None if logprob is None else logprob.weight_B,
        "logprob_constant": None if logprob is None else logprob.constant_B,
        "reduce_sum": logprob is not None and logprob.reduction == "sum",
    }
