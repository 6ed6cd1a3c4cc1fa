"""guided_flow_step is guided_velocity, then flow_step, with nothing rounded in between."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import flow_step, guided_flow_step, guided_velocity
from tests.kernels.flow_cases import (
    IMPLS,
    RENORMS,
    SHAPES,
    assert_as_exact_as_plain,
    expected_step,
    expected_velocity,
    make_case,
    needs_cpp,
    plain_velocity,
)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize(("lengths", "channels"), SHAPES)
def test_in_float32_it_is_the_two_ops_bit_for_bit(lengths, channels, renorm, impl):
    case = make_case(lengths, channels)
    velocity_LC = guided_velocity(**case.guidance(), renorm=renorm, impl=impl)
    expected = flow_step(**case.step(), velocity_LC=velocity_LC, cu_seqlens=case.cu_seqlens, impl=impl)
    actual = guided_flow_step(**case.guidance(), **case.step(), renorm=renorm, impl=impl)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize(("lengths", "channels"), SHAPES)
def test_error_is_that_of_plain_torch_at_most(lengths, channels, renorm, dtype, impl):
    case = make_case(lengths, channels).velocities_to(dtype)  # the samples stay in float32, as in a sampler
    actual = guided_flow_step(**case.guidance(), **case.step(), renorm=renorm, impl=impl)
    plain = expected_step(case, plain_velocity(case, renorm)).float()
    assert_as_exact_as_plain(actual, plain, expected_step(case, expected_velocity(case, renorm)))


@needs_cpp
def test_bits_do_not_depend_on_the_number_of_threads():
    case = make_case([4096, 999, 1], 64)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(guided_flow_step(**case.guidance(), **case.step(), impl="cpp"))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(impl):
    case = make_case([150, 1, 33], 65).velocities_to(torch.bfloat16)
    packed = guided_flow_step(**case.guidance(), **case.step(), impl=impl)
    cases = [case.take(i) for i in range(3)]
    alone = [guided_flow_step(**one.guidance(), **one.step(), impl=impl) for one in cases]
    assert torch.equal(packed, torch.cat(alone))


def test_gradients():
    case = make_case([3, 2, 4], 3).velocities_to(torch.float64).samples_to(torch.float64)
    fields = [
        x.requires_grad_() for x in (case.sample_LC, case.cond_LC, case.text_uncond_LC, case.image_uncond_LC)
    ]

    def step(sample_LC, cond_LC, text_uncond_LC, image_uncond_LC):
        changed = {"cond_LC": cond_LC, "text_uncond_LC": text_uncond_LC, "image_uncond_LC": image_uncond_LC}
        return guided_flow_step(**{**case.guidance(), **changed}, **{**case.step(), "sample_LC": sample_LC})

    assert torch.autograd.gradcheck(step, fields)
