"""guided_flow_step is guided_velocity, then flow_step, with nothing rounded in between."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realign_kernels import flow_step, guided_flow_step, guided_velocity
from tests.kernels.flow_cases import (
    IMPLS,
    KERNELS,
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
    case = make_case(lengths, channels).on(impl)
    velocity_LC = guided_velocity(**case.guided(renorm), impl=impl)
    step = {**case.step(has_keys=True), "logprob": case.logprob(), "cu_seqlens": case.cu_seqlens}
    expected = flow_step(**step, velocity_LC=velocity_LC, impl=impl)
    actual = guided_flow_step(**{**case.guided(renorm), **step}, impl=impl)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("renorm", RENORMS)
@pytest.mark.parametrize(("lengths", "channels"), SHAPES)
def test_error_is_that_of_plain_torch_at_most(lengths, channels, renorm, dtype, impl):
    case = make_case(lengths, channels).velocities_to(dtype)  # the samples stay in float32, as in a sampler
    on_device = case.on(impl)
    actual = guided_flow_step(**on_device.guided(renorm), **on_device.step(), impl=impl)
    plain = expected_step(case, plain_velocity(case, renorm)).float()
    assert_as_exact_as_plain(actual, plain, expected_step(case, expected_velocity(case, renorm)))


@needs_cpp
def test_bits_do_not_depend_on_the_number_of_threads():
    case = make_case([4096, 999, 1], 64)
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(guided_flow_step(**case.guided(), **case.step(True), impl="cpp"))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("has_keys", [False, True])
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(has_keys, impl):
    case = make_case([150, 1, 33, 0, 64], 65).velocities_to(torch.bfloat16).on(impl)

    def run(one, renorm):
        return guided_flow_step(**one.guided(renorm), **one.step(has_keys), logprob=one.logprob(), impl=impl)

    modes = ["global", "channel", "none", "text_channel", "global"]
    packed = run(case, modes)
    alone = [run(case.take(i), mode) for i, mode in enumerate(modes)]
    for ours, parts in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(parts))


@pytest.mark.parametrize("impl", IMPLS)
def test_renorm_as_codes_is_renorm_as_names(impl):
    case = make_case([15, 3, 8, 2], 7).on(impl)
    modes = ["none", "global", "channel", "text_channel"]
    codes_B = torch.tensor([RENORMS.index(mode) for mode in modes], dtype=torch.int32).to(case.a_B.device)
    expected, actual = (
        guided_flow_step(**case.guided(renorm), **case.step(), impl=impl) for renorm in (modes, codes_B)
    )
    assert torch.equal(actual, expected)


def test_gradients():
    case = make_case([3, 2, 4], 3).velocities_to(torch.float64).samples_to(torch.float64)
    fields = [x.requires_grad_() for x in (case.sample_LC, *case.velocities())]
    arguments = {**case.guided(), **case.step()}

    def step(sample_LC, *velocities):
        return guided_flow_step(**{**arguments, "sample_LC": sample_LC, "velocities": velocities})

    assert torch.autograd.gradcheck(step, fields)


@pytest.mark.parametrize("impl", KERNELS)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), channels=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_any_sizes(impl, lengths, channels, seed):
    case = make_case(lengths, channels, seed)
    renorm = [RENORMS[(seed + index) % 4] for index in range(len(lengths))]
    on_device = case.on(impl)
    actual, expected = (
        guided_flow_step(**one.guided(renorm), **one.step(True), logprob=one.logprob(), impl=path)
        for one, path in ((on_device, impl), (case, "reference"))
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-6, atol=2e-6)
