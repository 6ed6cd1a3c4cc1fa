"""flow_step against float64, and what must not change it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realign_kernels import StepCoefficients, flow_step
from tests.kernels.flow_cases import (
    IMPLS,
    KERNELS,
    SHAPES,
    FlowCase,
    assert_as_exact_as_plain,
    expected_step,
    make_case,
)

DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


def plain_step(case: FlowCase) -> torch.Tensor:
    """Every operation rounds to the dtype of the sample."""
    lengths = case.cu_seqlens.diff()
    dtype = case.sample_LC.dtype
    a, b, std = (x.to(dtype).repeat_interleave(lengths)[:, None] for x in (case.a_B, case.b_B, case.std_B))
    return a * case.sample_LC + b * case.cond_LC.to(dtype) + std * case.noise_LC


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("sample_dtype", "velocity_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize(("lengths", "channels"), SHAPES)
def test_error_is_that_of_plain_torch_at_most(lengths, channels, sample_dtype, velocity_dtype, impl):
    case = make_case(lengths, channels).velocities_to(velocity_dtype).samples_to(sample_dtype)
    actual = flow_step(**case.on(impl).stepped(), impl=impl)
    assert actual.dtype == sample_dtype
    assert_as_exact_as_plain(actual, plain_step(case), expected_step(case, case.cond_LC))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("has_keys", [False, True])
@pytest.mark.parametrize(("sample_dtype", "velocity_dtype"), DTYPE_PAIRS)
def test_every_path_has_the_bits_of_the_reference(sample_dtype, velocity_dtype, has_keys, impl):
    for channels in (64, 65):
        case = make_case([150, 0, 33], channels).velocities_to(velocity_dtype).samples_to(sample_dtype)
        actual = flow_step(**case.on(impl).stepped(has_keys), impl=impl)
        assert torch.equal(actual.cpu(), flow_step(**case.stepped(has_keys), impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("has_keys", [False, True])
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(has_keys, impl):
    case = make_case([150, 1, 33, 0], 65).on(impl)
    packed = flow_step(**case.stepped(has_keys), logprob=case.logprob(), impl=impl)
    cases = [case.take(i) for i in range(4)]
    alone = [flow_step(**one.stepped(has_keys), logprob=one.logprob(), impl=impl) for one in cases]
    for ours, parts in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(parts))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_noise_it_is_the_euler_step(impl):
    case = make_case([4, 3], 5).on(impl)
    b_B = torch.tensor([-0.25, -0.5], device=case.a_B.device)
    euler = StepCoefficients(torch.ones_like(b_B), b_B)
    actual = flow_step(case.sample_LC, case.cond_LC, case.cu_seqlens, euler, impl=impl)
    steps_L1 = torch.tensor([0.25] * 4 + [0.5] * 3)[:, None].to(b_B.device)
    assert torch.equal(actual, case.sample_LC - steps_L1 * case.cond_LC)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("sample_dtype", "velocity_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize(("lengths", "channels"), SHAPES)
def test_logprob_is_of_the_sample_that_is_returned(
    lengths, channels, sample_dtype, velocity_dtype, reduction, impl
):
    case = make_case(lengths, channels).velocities_to(velocity_dtype).samples_to(sample_dtype)
    on_device = case.on(impl)
    next_LC, logprob_B = flow_step(**on_device.stepped(True), logprob=on_device.logprob(reduction), impl=impl)
    assert logprob_B.dtype == torch.float32
    noiseless = replace(case, std_B=torch.zeros_like(case.std_B))
    error_LC = (next_LC.cpu().double() - expected_step(noiseless, case.cond_LC)) ** 2
    bounds = list(pairwise(case.cu_seqlens.tolist()))
    error_B = [error_LC[start:end].sum().item() for start, end in bounds]
    if reduction == "mean":
        sizes = [max((end - start) * channels, 1) for start, end in bounds]
        error_B = [error / size for error, size in zip(error_B, sizes, strict=True)]
    expected_B = case.constant_B.double() - case.weight_B.double() * torch.tensor(error_B).double()
    torch.testing.assert_close(logprob_B.cpu().double(), expected_B, rtol=3e-6, atol=3e-6)


def test_gradients():
    case = make_case([3, 2], 4).velocities_to(torch.float64).samples_to(torch.float64)
    fields = [x.requires_grad_() for x in (case.sample_LC, case.cond_LC, case.noise_LC)]
    coefficients = case.step()["coefficients"]

    def step(sample_LC, velocity_LC, noise_LC):
        return flow_step(sample_LC, velocity_LC, case.cu_seqlens, coefficients, noise_LC)

    assert torch.autograd.gradcheck(step, fields)


@pytest.mark.parametrize("impl", KERNELS)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), channels=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_any_sizes(impl, lengths, channels, seed):
    case = make_case(lengths, channels, seed)
    on_device = case.on(impl)
    actual = flow_step(**on_device.stepped(True), logprob=on_device.logprob(), impl=impl)
    expected = flow_step(**case.stepped(True), logprob=case.logprob(), impl="reference")
    assert torch.equal(actual[0].cpu(), expected[0])
    torch.testing.assert_close(actual[1].cpu(), expected[1], rtol=1e-6, atol=1e-6)
