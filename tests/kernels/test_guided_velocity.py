"""guided_velocity against float64, sample by sample, and what must not change it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realign_kernels import Guidance, guided_velocity
from tests.kernels.flow_cases import (
    IMPLS,
    KERNELS,
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
    actual = guided_velocity(**case.on(impl).guided(renorm), impl=impl)
    assert actual.dtype == dtype
    assert_as_exact_as_plain(actual, plain_velocity(case, renorm), expected_velocity(case, renorm))


@pytest.mark.parametrize("renorm", RENORMS)
def test_reference_in_float64_is_the_formula(renorm):
    case = make_case([3, 0, 5, 9, 2], 7).velocities_to(torch.float64)
    actual = guided_velocity(**case.guided(renorm), impl="reference")
    torch.testing.assert_close(actual, expected_velocity(case, renorm), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("renorm", RENORMS)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(renorm, impl):
    case = make_case([150, 1, 33, 64, 700], 65).on(impl)
    packed = guided_velocity(**case.guided(renorm), impl=impl)
    alone = [guided_velocity(**case.take(i).guided(renorm), impl=impl) for i in range(5)]
    assert torch.equal(packed, torch.cat(alone))


@needs_cpp
@pytest.mark.parametrize("renorm", RENORMS)
def test_bits_do_not_depend_on_the_number_of_threads(renorm):
    case = make_case([4096, 999, 1], 64)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(guided_velocity(**case.guided(renorm), impl="cpp"))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpp_has_the_bits_of_the_reference_where_no_norm_is_taken(dtype):
    case = make_case([150, 33, 2], 65).velocities_to(dtype)
    actual, expected = (guided_velocity(**case.guided("none"), impl=impl) for impl in ("cpp", "reference"))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_unguided_sample_passes_through_and_its_other_branches_are_not_read(impl):
    case = make_case([5, 4, 3], 6).on(impl)  # the second sample has text scale 1 and image scale 3
    text_LC, image_LC = case.text_uncond_LC.clone(), case.image_uncond_LC.clone()
    text_LC[5:9] = math.nan
    image_LC[5:] = math.nan  # the third has image scale 1
    case = replace(case, text_uncond_LC=text_LC, image_uncond_LC=image_LC)
    actual = guided_velocity(**case.guided(), impl=impl)
    assert torch.equal(actual[5:9], case.cond_LC[5:9])
    assert not actual.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_branches_may_be_absent_where_no_scale_asks_for_them(impl):
    case = make_case([5, 4], 6).on(impl)
    ones = torch.ones_like(case.a_B)
    text_only = guided_velocity(
        case.velocities()[:2], case.cu_seqlens, Guidance(case.text_scale_B), impl=impl
    )
    plain = replace(make_case([5, 4], 6), image_scale_B=torch.ones(2), renorm_min_B=torch.zeros(2))
    expected = expected_velocity(plain, "global")
    torch.testing.assert_close(text_only.cpu().double(), expected, rtol=1e-6, atol=1e-6)
    unguided = guided_velocity([case.cond_LC], case.cu_seqlens, Guidance(ones, ones), impl=impl)
    assert torch.equal(unguided, case.cond_LC)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_renorm_mode_per_sample(impl):
    case = make_case([5, 4, 3, 6, 8], 6).on(impl)
    modes = ["none", "channel", "global", "text_channel", "channel"]
    actual = guided_velocity(**case.guided(modes), impl=impl)
    alone = [guided_velocity(**case.take(i).guided(mode), impl=impl) for i, mode in enumerate(modes)]
    assert torch.equal(actual, torch.cat(alone))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("renorm", ["global", "channel"])
def test_renorm_never_enlarges(renorm, impl):
    case = make_case([40, 3], 16).on(impl)
    actual = guided_velocity(
        **replace(case, renorm_min_B=torch.zeros_like(case.a_B)).guided(renorm), impl=impl
    )
    assert (actual[:40].norm() <= case.cond_LC[:40].norm() * (1 + 1e-6)).item()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("renorm", RENORMS)
def test_zero_velocities_stay_zero_and_nan_stays_nan(renorm, impl):
    case = make_case([4], 5).on(impl)
    zero = torch.zeros_like(case.cond_LC)
    zeros = replace(case, cond_LC=zero, text_uncond_LC=zero, image_uncond_LC=zero)
    assert torch.equal(guided_velocity(**zeros.guided(renorm), impl=impl), zero)
    nans = replace(case, cond_LC=torch.full_like(zero, math.nan))
    assert guided_velocity(**nans.guided(renorm), impl=impl).isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    case = make_case([9, 4], 6).on(impl)
    expected = guided_velocity(**case.guided(), impl=impl)
    wide_LC = torch.stack([case.cond_LC, case.text_uncond_LC], dim=-1)
    strided = replace(
        case,
        cond_LC=wide_LC[..., 0],
        text_uncond_LC=wide_LC[..., 1],
        image_uncond_LC=case.image_uncond_LC.T.contiguous().T,
        text_scale_B=case.text_scale_B.repeat_interleave(2)[::2],
    )
    assert not strided.cond_LC.is_contiguous()
    torch.testing.assert_close(guided_velocity(**strided.guided(), impl=impl), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("renorm", RENORMS)
def test_gradients_of_the_definition(renorm):
    case = make_case([3, 2, 4], 3).velocities_to(torch.float64)
    branches = [x.requires_grad_() for x in case.velocities()]
    arguments = case.guided(renorm)

    def run(*velocities):
        return guided_velocity(**{**arguments, "velocities": velocities})

    assert torch.autograd.gradcheck(run, branches)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renorm", RENORMS)
def test_gradients_of_the_kernels(renorm, dtype, impl):
    """Every branch's gradient against float64's; only the branches that want one get one."""
    exact = _gradients(make_case([7, 0, 5, 9], 6).velocities_to(torch.float64), renorm, "reference")
    plain = _gradients(make_case([7, 0, 5, 9], 6).velocities_to(dtype), renorm, "reference")
    actual = _gradients(make_case([7, 0, 5, 9], 6).velocities_to(dtype).on(impl), renorm, impl)
    for ours, low, true in zip(actual, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_exact_as_plain(ours, low, true)
    case = make_case([4], 6).on(impl)
    case.text_uncond_LC.requires_grad_()
    guided_velocity(**case.guided(renorm), impl=impl).sum().backward()
    assert case.cond_LC.grad is None
    assert case.text_uncond_LC.grad.abs().sum() > 0


def _gradients(case, renorm, impl):
    branches = [x.requires_grad_() for x in case.velocities()]
    out_LC = guided_velocity(**case.guided(renorm), impl=impl)
    weights = torch.linspace(-1, 1, out_LC.numel()).view(out_LC.shape)
    out_LC.backward(weights.to(out_LC.device, out_LC.dtype))
    return [branch.grad for branch in branches]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_may_be_wider_than_the_velocities(dtype, impl):
    case = make_case([7, 3], 6).velocities_to(dtype).on(impl)
    wide_LC = guided_velocity(**case.guided(), dtype=torch.float32, impl=impl)
    assert wide_LC.dtype == torch.float32
    assert torch.equal(wide_LC.to(dtype), guided_velocity(**case.guided(), impl=impl))


@pytest.mark.parametrize("impl", KERNELS)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), channels=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_any_sizes(impl, lengths, channels, seed):
    case = make_case(lengths, channels, seed)
    renorm = [RENORMS[(seed + index) % 4] for index in range(len(lengths))]
    actual = guided_velocity(**case.on(impl).guided(renorm), impl=impl)
    torch.testing.assert_close(
        actual.cpu(), guided_velocity(**case.guided(renorm), impl="reference"), rtol=2e-6, atol=2e-6
    )
