"""flow_step against float64, and what must not change it."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import flow_step
from tests.kernels.flow_cases import (
    IMPLS,
    SHAPES,
    FlowCase,
    assert_as_exact_as_plain,
    expected_step,
    make_case,
    needs_cpp,
)

DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


def run_step(case: FlowCase, impl: str) -> torch.Tensor:
    return flow_step(**case.step(), velocity_LC=case.cond_LC, cu_seqlens=case.cu_seqlens, impl=impl)


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
    actual = run_step(case, impl)
    assert actual.dtype == sample_dtype
    assert_as_exact_as_plain(actual, plain_step(case), expected_step(case, case.cond_LC))


@needs_cpp
@pytest.mark.parametrize(("sample_dtype", "velocity_dtype"), DTYPE_PAIRS)
def test_cpp_has_the_bits_of_the_reference(sample_dtype, velocity_dtype):
    case = make_case([150, 0, 33], 65).velocities_to(velocity_dtype).samples_to(sample_dtype)
    assert torch.equal(run_step(case, "cpp"), run_step(case, "reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(impl):
    case = make_case([150, 1, 33], 65)
    assert torch.equal(run_step(case, impl), torch.cat([run_step(case.take(i), impl) for i in range(3)]))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_noise_it_is_the_euler_step(impl):
    case = make_case([4, 3], 5)
    actual = flow_step(
        case.sample_LC, case.cond_LC, case.cu_seqlens, torch.ones(2), torch.tensor([-0.25, -0.5]), impl=impl
    )
    steps_L1 = torch.tensor([0.25] * 4 + [0.5] * 3)[:, None]
    assert torch.equal(actual, case.sample_LC - steps_L1 * case.cond_LC)


def test_gradients():
    case = make_case([3, 2], 4).velocities_to(torch.float64).samples_to(torch.float64)
    fields = [x.requires_grad_() for x in (case.sample_LC, case.cond_LC, case.noise_LC)]

    def step(sample_LC, velocity_LC, noise_LC):
        return flow_step(sample_LC, velocity_LC, case.cu_seqlens, case.a_B, case.b_B, case.std_B, noise_LC)

    assert torch.autograd.gradcheck(step, fields)
