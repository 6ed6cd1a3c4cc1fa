"""sde_logprob: the density, both gradients, and that it repeats what sampling said, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realign_kernels import (
    LogProbCoefficients,
    RatioBias,
    StepCoefficients,
    flow_step,
    guided_flow_step,
    guided_velocity,
    sde_logprob,
)
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import (
    IMPLS,
    KERNELS,
    SHAPES,
    FlowCase,
    assert_as_exact_as_plain,
    make_case,
    needs_triton,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments_of(case: FlowCase, reduction: str = "mean") -> dict:
    """The stored step is the sample and the noise field: any pair has a log-prob."""
    return {
        "step": (case.sample_LC, case.noise_LC),
        "velocity_LC": case.cond_LC,
        "cu_seqlens": case.cu_seqlens,
        "coefficients": StepCoefficients(case.a_B, case.b_B),
        "logprob": case.logprob(reduction),
        "bias": RatioBias(case.text_uncond_LC, case.weight_B + 1),
    }


def evaluate(case: FlowCase, impl: str, reduction: str = "mean") -> list[torch.Tensor]:
    """Both results, and the gradient to the velocity of a weighted sum of both."""
    velocity_LC = case.cond_LC.clone().requires_grad_()
    arguments = {**arguments_of(case, reduction), "velocity_LC": velocity_LC}
    logprob_B, bias_B = sde_logprob(**arguments, impl=impl)
    weights_B = torch.arange(1, len(logprob_B) + 1, device=logprob_B.device)
    (logprob_B * weights_B - bias_B * (weights_B + 0.5)).sum().backward()
    return [logprob_B.detach(), bias_B.detach(), velocity_LC.grad]


def plain(case: FlowCase, reduction: str) -> list[torch.Tensor]:
    """As a trainer writes it in the dtype of the velocity: per-sample loops, autograd."""
    return evaluate(case, "reference", reduction)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("lengths", "channels"), SHAPES)
def test_values_and_gradient(lengths, channels, reduction, dtype, impl):
    case = make_case(lengths, channels).velocities_to(dtype)
    actual = evaluate(case.on(impl), impl, reduction)
    exact = evaluate(case.velocities_to(torch.float64).samples_to(torch.float64), "reference", reduction)
    assert [tensor.dtype for tensor in actual] == [torch.float32, torch.float32, dtype]
    for ours, low, true in zip(actual, plain(case, reduction), exact, strict=True):
        assert_as_exact_as_plain(ours, low, true)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_the_definition(reduction):
    case = make_case([3, 1, 4], 3).velocities_to(torch.float64).samples_to(torch.float64)
    arguments = arguments_of(case, reduction)
    case.cond_LC.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda velocity_LC: sde_logprob(**{**arguments, "velocity_LC": velocity_LC}), [case.cond_LC]
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ratio_is_one_for_the_velocity_that_was_sampled(reduction, dtype, impl):
    """Without guidance, and with it through `guided_velocity` in float32: the recorded bits."""
    case = make_case([150, 1, 33, 0, 64], 64).velocities_to(dtype).on(impl)
    logprob, coefficients = case.logprob(reduction), case.step()["coefficients"]
    rest = {"cu_seqlens": case.cu_seqlens, "coefficients": coefficients, "logprob": logprob, "impl": impl}
    next_LC, recorded_B = flow_step(**case.stepped(True), logprob=logprob, impl=impl)
    again_B = sde_logprob((case.sample_LC, next_LC), case.cond_LC.requires_grad_(), **rest)
    assert torch.equal(again_B.detach(), recorded_B)
    with torch.no_grad():
        next_LC, recorded_B = guided_flow_step(**case.guided(), **case.step(True), logprob=logprob, impl=impl)
    velocity_LC = guided_velocity(**case.guided(), dtype=torch.float32, impl=impl)
    bias = RatioBias(velocity_LC.detach(), case.weight_B)
    again_B, bias_B = sde_logprob((case.sample_LC, next_LC), velocity_LC, **rest, bias=bias)
    assert torch.equal(again_B.detach(), recorded_B)
    assert torch.equal(bias_B.detach(), torch.zeros_like(bias_B))
    again_B.sum().backward()
    assert case.cond_LC.grad.abs().sum() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(impl):
    case = make_case([150, 1, 33, 0], 65).velocities_to(torch.bfloat16).on(impl)
    packed = sde_logprob(**arguments_of(case), impl=impl)
    alone = [sde_logprob(**arguments_of(case.take(i)), impl=impl) for i in range(4)]
    for ours, parts in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(parts))


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_velocity_gets_a_gradient(impl):
    case = make_case([4, 2], 6).on(impl)
    fields = [case.sample_LC, case.noise_LC, case.cond_LC, case.text_uncond_LC]
    for field in fields:
        field.requires_grad_()
    logprob_B, bias_B = sde_logprob(**arguments_of(case), impl=impl)
    (logprob_B + bias_B).sum().backward()
    assert [field.grad is not None for field in fields] == [False, False, True, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    case = make_case([9, 4], 6).on(impl)
    strided = replace(
        case,
        cond_LC=torch.stack([case.cond_LC, case.sample_LC], dim=-1)[..., 0],
        noise_LC=case.noise_LC.T.contiguous().T,
    )
    expected, actual = (sde_logprob(**arguments_of(one), impl=impl) for one in (case, strided))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", KERNELS)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), channels=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_any_sizes(impl, lengths, channels, seed):
    case = make_case(lengths, channels, seed)
    for ours, theirs in zip(evaluate(case.on(impl), impl), evaluate(case, "reference"), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=3e-6, atol=1e-6)


@needs_triton
def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    from realign_kernels.sde_logprob import triton as path

    assert path.sde_logprob_triton is not None
    device = device_of("triton")
    case = make_case([3, 0, 5], 6)
    step = (case.sample_LC, case.cond_LC, case.noise_LC, case.cu_seqlens, case.a_B, case.b_B, case.weight_B)
    step = [tensor.to(device) for tensor in step]
    old_LC, number_B = case.text_uncond_LC.to(device), case.constant_B.to(device)
    ops = torch.ops.realign_kernels
    torch.library.opcheck(ops.sde_logprob_triton.default, (*step, number_B, False, old_LC, number_B))
    torch.library.opcheck(ops.sde_logprob_triton.default, (*step, number_B, True, None, None))
    backward = ops.sde_logprob_backward_triton.default
    torch.library.opcheck(backward, (*step, False, old_LC, number_B, number_B, number_B))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"velocity_LC": torch.zeros(7, 3)}, r"step\[0\] has shape \(7, 4\): must be that of velocity_LC"),
        ({"velocity_LC": torch.zeros(7)}, r"velocity_LC has shape \(7,\): must be packed tokens"),
        ({"step": (torch.zeros(7, 4), torch.zeros(7, 4).half())}, r"step\[1\] has dtype torch.float16"),
        (
            {"bias": RatioBias(torch.zeros(7, 4), torch.tensor([1.0, -1.0]))},
            r"bias.weight_B\[1\] is -1: must be finite and at least 0",
        ),
        (
            {"bias": RatioBias(torch.zeros(6, 4), torch.ones(2))},
            r"bias.old_velocity_LC has shape \(6, 4\): must be that of velocity_LC",
        ),
        (
            {"logprob": LogProbCoefficients(torch.ones(2), torch.ones(2), "max")},
            "logprob.reduction is 'max': must be one of mean, sum",
        ),
        (
            {"logprob": LogProbCoefficients(torch.tensor([1.0, float("inf")]), torch.ones(2))},
            r"logprob.weight_B\[1\] is inf: must be finite",
        ),
        ({"impl": "cuda"}, "sde_logprob: impl is 'cuda': must be one of auto, reference, cpp, triton"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        sde_logprob(**{**arguments_of(make_case([3, 4], 4)), **change})
