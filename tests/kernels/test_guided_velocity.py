"""guided_velocity against float64, sample by sample, and what must not change it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from realign_kernels import guided_velocity
from tests.kernels.flow_cases import (
    IMPLS,
    RENORMS,
    SHAPES,
    assert_as_exact_as_plain,
    expected_velocity,
    make_case,
    needs_cpp,
    plain_velocity,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize(("lengths", "channels"), SHAPES)
def test_error_is_that_of_plain_torch_at_most(lengths, channels, renorm, dtype, impl):
    case = make_case(lengths, channels).velocities_to(dtype)
    actual = guided_velocity(**case.guidance(), renorm=renorm, impl=impl)
    assert actual.dtype == dtype
    assert_as_exact_as_plain(actual, plain_velocity(case, renorm), expected_velocity(case, renorm))


@pytest.mark.parametrize("renorm", RENORMS)
def test_reference_in_float64_is_the_formula(renorm):
    case = make_case([3, 0, 5, 9, 2], 7).velocities_to(torch.float64)
    actual = guided_velocity(**case.guidance(), renorm=renorm, impl="reference")
    torch.testing.assert_close(actual, expected_velocity(case, renorm), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("renorm", RENORMS)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(renorm, impl):
    case = make_case([150, 1, 33, 64, 700], 65)
    packed = guided_velocity(**case.guidance(), renorm=renorm, impl=impl)
    alone = [guided_velocity(**case.take(i).guidance(), renorm=renorm, impl=impl) for i in range(5)]
    assert torch.equal(packed, torch.cat(alone))


@needs_cpp
@pytest.mark.parametrize("renorm", RENORMS)
def test_bits_do_not_depend_on_the_number_of_threads(renorm):
    case = make_case([4096, 999, 1], 64)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(guided_velocity(**case.guidance(), renorm=renorm, impl="cpp"))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp_has_the_bits_of_the_reference_where_no_norm_is_taken(dtype):
    case = make_case([150, 33, 2], 65).velocities_to(dtype)
    actual, expected = (
        guided_velocity(**case.guidance(), renorm="none", impl=impl) for impl in ("cpp", "reference")
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_unguided_sample_passes_through_and_its_other_branches_are_not_read(impl):
    case = make_case([5, 4, 3], 6)  # the second sample has text scale 1 and image scale 3
    text_LC, image_LC = case.text_uncond_LC.clone(), case.image_uncond_LC.clone()
    text_LC[5:9] = math.nan
    image_LC[5:] = math.nan  # the third has image scale 1
    case = replace(case, text_uncond_LC=text_LC, image_uncond_LC=image_LC)
    actual = guided_velocity(**case.guidance(), impl=impl)
    assert torch.equal(actual[5:9], case.cond_LC[5:9])
    assert not actual.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_branches_may_be_absent_where_no_scale_asks_for_them(impl):
    case = make_case([5, 4], 6)
    ones = torch.ones(2)
    text_only = guided_velocity(
        case.cond_LC, case.text_uncond_LC, None, case.cu_seqlens, case.text_scale_B, None, impl=impl
    )
    expected = expected_velocity(replace(case, image_scale_B=ones, renorm_min_B=torch.zeros(2)), "global")
    torch.testing.assert_close(text_only.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(
        guided_velocity(case.cond_LC, None, None, case.cu_seqlens, ones, ones, impl=impl), case.cond_LC
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_one_renorm_mode_per_sample(impl):
    case = make_case([5, 4, 3, 6, 8], 6)
    modes = ["none", "channel", "global", "text_channel", "channel"]
    actual = guided_velocity(**case.guidance(), renorm=modes, impl=impl)
    alone = [
        guided_velocity(**case.take(i).guidance(), renorm=mode, impl=impl) for i, mode in enumerate(modes)
    ]
    assert torch.equal(actual, torch.cat(alone))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("renorm", ["global", "channel"])
def test_renorm_never_enlarges(renorm, impl):
    case = make_case([40, 3], 16)
    actual = guided_velocity(
        **replace(case, renorm_min_B=torch.zeros(2)).guidance(), renorm=renorm, impl=impl
    )
    assert (actual[:40].norm() <= case.cond_LC[:40].norm() * (1 + 1e-6)).item()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("renorm", RENORMS)
def test_zero_velocities_stay_zero_and_nan_stays_nan(renorm, impl):
    case = make_case([4], 5)
    zero = torch.zeros(4, 5)
    guidance = replace(case, cond_LC=zero, text_uncond_LC=zero, image_uncond_LC=zero).guidance()
    assert torch.equal(guided_velocity(**guidance, renorm=renorm, impl=impl), zero)
    guidance = replace(case, cond_LC=torch.full((4, 5), math.nan)).guidance()
    assert guided_velocity(**guidance, renorm=renorm, impl=impl).isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    case = make_case([9, 4], 6)
    expected = guided_velocity(**case.guidance(), impl=impl)
    wide_LC = torch.stack([case.cond_LC, case.text_uncond_LC], dim=-1)
    strided = replace(
        case,
        cond_LC=wide_LC[..., 0],
        text_uncond_LC=wide_LC[..., 1],
        image_uncond_LC=case.image_uncond_LC.T.contiguous().T,
        text_scale_B=case.text_scale_B.repeat_interleave(2)[::2],
    )
    assert not strided.cond_LC.is_contiguous()
    torch.testing.assert_close(
        guided_velocity(**strided.guidance(), impl=impl), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("renorm", RENORMS)
def test_gradients(renorm):
    case = make_case([3, 2, 4], 3).velocities_to(torch.float64)
    branches = [x.requires_grad_() for x in (case.cond_LC, case.text_uncond_LC, case.image_uncond_LC)]
    numbers = (case.cu_seqlens, case.text_scale_B, case.image_scale_B, renorm, case.renorm_min_B)
    assert torch.autograd.gradcheck(lambda *branches: guided_velocity(*branches, *numbers), branches)
