"""Signature, formula, checks and dispatch of `sde_logprob`. L packed tokens, C channels, B samples."""

from __future__ import annotations

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.arguments import LogProbCoefficients, RatioBias, StepCoefficients
from realign_kernels.checks import check_cu_seqlens, check_like, check_packed, check_per_sample
from realign_kernels.dispatch import choose_impl
from realign_kernels.flow_step.api import check_coefficients, check_logprob
from realign_kernels.sde_logprob.reference import sde_logprob_gradient, sde_logprob_reference


def sde_logprob(
    step: tuple[Tensor, Tensor],
    velocity_LC: Tensor,
    cu_seqlens: Tensor,
    coefficients: StepCoefficients,
    logprob: LogProbCoefficients,
    bias: RatioBias | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of a stored sampler step under a velocity, per sample:

        logprob = constant - weight * reduced((x_next - (a * x + b * v)) ** 2)
        bias = bias.weight * reduced((b * (v - v_old)) ** 2)                              if asked

    For the velocity that the step was sampled with it is the log-prob that `flow_step` and `guided_flow_step`
    gave, bit for bit, so that the first ratio of GRPO is exactly one. The schedule gives the numbers.

    Args:
        step: x and x_next, [L, C]; float32 is what a trajectory should hold; bfloat16, float16, float64.
        velocity_LC: v, same shape; its dtype may differ.
        cu_seqlens: int32 [B+1], offsets of the samples.
        coefficients: a and b of each sample; std is not read.
        logprob: weight, constant and reduction.
        bias: the old velocity and the weight of GRPO-Guard's term, if it is wanted.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: log-probs, float32 [B] (float64 if an input is); with `bias`, the pair of that and the biases
        [B]. Differentiable in `velocity_LC` only: x, x_next and the old velocity are records.
    Raises: ValueError naming the argument and its value.
    Source: Flow-GRPO, arXiv 2505.05470, eq. 10; GRPO-Guard, arXiv 2510.22319, for the bias.
    """
    _check(step, velocity_LC, cu_seqlens, coefficients, logprob, bias)
    tensors = (*(field.detach() for field in step), velocity_LC)
    path = choose_impl("sde_logprob", impl, tensors, {"cpp": True, "triton": True})
    numbers = (coefficients, logprob, bias)
    if path == "reference":
        logprob_B, bias_B = sde_logprob_reference(step, velocity_LC, cu_seqlens, *numbers)
    else:
        logprob_B, bias_B = _SDELogProb.apply(velocity_LC, path, step, cu_seqlens, numbers)
    return logprob_B if bias is None else (logprob_B, bias_B)


class _SDELogProb(torch.autograd.Function):
    """Both results by a compiled path, and their gradient to the velocity."""

    @staticmethod
    def forward(
        ctx, velocity_LC: Tensor, path: str, step: tuple[Tensor, Tensor], cu_seqlens: Tensor, numbers: tuple
    ):
        ctx.path, ctx.numbers = path, numbers
        ctx.save_for_backward(velocity_LC, *step, cu_seqlens)
        if path == "triton":
            from realign_kernels.sde_logprob.triton import sde_logprob_triton as run
        else:
            run = native.sde_logprob_cpp
        return run(**_name_arguments(step, velocity_LC, cu_seqlens, *numbers))

    @staticmethod
    def backward(ctx, grad_logprob_B: Tensor, grad_bias_B: Tensor):
        velocity_LC, *step, cu_seqlens = ctx.saved_tensors
        grads = (grad_logprob_B, grad_bias_B)
        if ctx.path == "triton":
            from realign_kernels.sde_logprob.triton import sde_logprob_backward_triton

            names = _name_arguments(step, velocity_LC, cu_seqlens, *ctx.numbers)
            del names["constant"]
            grad_LC = sde_logprob_backward_triton(**names, grad_logprob=grads[0], grad_bias=grads[1])
        else:
            grad_LC = sde_logprob_gradient(step, velocity_LC, cu_seqlens, *ctx.numbers, grads)
        return grad_LC, None, None, None, None


def _name_arguments(
    step: tuple[Tensor, Tensor],
    velocity_LC: Tensor,
    cu_seqlens: Tensor,
    coefficients: StepCoefficients,
    logprob: LogProbCoefficients,
    bias: RatioBias | None,
) -> dict[str, Tensor | bool | None]:
    """The arguments as the compiled ops call them."""
    return {
        "sample": step[0],
        "velocity": velocity_LC,
        "next_sample": step[1],
        "cu_seqlens": cu_seqlens,
        "a": coefficients.a_B,
        "b": coefficients.b_B,
        "weight": logprob.weight_B,
        "constant": logprob.constant_B,
        "reduce_sum": logprob.reduction == "sum",
        "old_velocity": None if bias is None else bias.old_velocity_LC,
        "bias_weight": None if bias is None else bias.weight_B,
    }


def _check(
    step: tuple[Tensor, Tensor],
    velocity_LC: Tensor,
    cu_seqlens: Tensor,
    coefficients: StepCoefficients,
    logprob: LogProbCoefficients,
    bias: RatioBias | None,
) -> None:
    """Raise ValueError for arguments that do not fit."""
    check_packed("velocity_LC", velocity_LC)
    check_like("step[0]", step[0], "velocity_LC", velocity_LC, same_dtype=False)
    check_like("step[1]", step[1], "step[0]", step[0])
    num_samples = check_cu_seqlens(cu_seqlens, velocity_LC)
    check_coefficients(coefficients, num_samples, velocity_LC)
    check_logprob(logprob, num_samples, velocity_LC)
    if bias is not None:
        check_like("bias.old_velocity_LC", bias.old_velocity_LC, "velocity_LC", velocity_LC)
        check_per_sample("bias.weight_B", bias.weight_B, num_samples, velocity_LC, minimum=0.0)
