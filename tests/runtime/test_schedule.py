"""Times, steps and the guidance interval against BAGEL's float32 loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realign.runtime.schedule import Schedule


@given(
    num=st.integers(2, 60),
    shift=st.sampled_from([1.0, 1.5, 3.0, 4.0]),
    low=st.sampled_from([0.0, 0.2, 0.4, 0.75]),
)
def test_schedule_is_the_reference_loop(num, shift, low):
    times = torch.linspace(1, 0, num)
    times = shift * times / (1 + (shift - 1) * times)
    schedule = Schedule.build(num, shift)
    assert schedule.num_steps == num - 1
    torch.testing.assert_close(torch.tensor(schedule.times), times, rtol=1e-6, atol=1e-7)
    moves = torch.tensor([step.b for step in schedule.steps])
    torch.testing.assert_close(-moves, times[:-1] - times[1:], rtol=1e-5, atol=2e-7)
    assert schedule.guided_steps((low, 1.0)) == tuple(bool(t > low and t <= 1.0) for t in times[:-1])


def test_ends_are_exact_and_euler_steps_add_up():
    schedule = Schedule.build(50, 3.0)
    assert schedule.times[0] == 1.0
    assert schedule.times[-1] == 0.0
    assert sum(step.b for step in schedule.steps) == pytest.approx(-1.0, abs=1e-15)
    assert all(step.a == 1.0 and step.std == 0.0 and step.b == step.dt for step in schedule.steps)
    assert sum(schedule.guided_steps((0.4, 1.0))) == 41


@pytest.mark.parametrize(("num", "shift"), [(1, 3.0), (0, 3.0), (5, 0.0), (5, float("nan"))])
def test_impossible_schedules_are_refused(num, shift):
    with pytest.raises(ValueError, match="must be"):
        Schedule.build(num, shift)


@pytest.mark.parametrize("rule", ["flow-grpo", "dance-grpo"])
@given(num=st.integers(3, 40), level=st.floats(0.1, 1.4), shift=st.sampled_from([1.0, 3.0]))
def test_sde_steps_follow_from_the_score(rule, num, level, shift):
    """`mean = x + (v - g**2 / 2 * score) dt`, the score from v: DanceGRPO's way of writing it, in numbers."""
    schedule = Schedule.build(num, shift).with_noise(rule, level)
    for index, step in enumerate(schedule.steps):
        t, x, v = step.t, 0.7, -1.3
        rate = level
        if rule == "flow-grpo":
            rate = level * math.sqrt(t / (1 - (schedule.times[1] if index == 0 else t)))
        x0 = x - t * v
        score = -(x - (1 - t) * x0) / t**2
        mean = x + (v - rate**2 / 2 * score) * step.dt
        assert step.a * x + step.b * v == pytest.approx(mean, rel=1e-9, abs=1e-9)
        assert step.std == pytest.approx(rate * math.sqrt(-step.dt))
        assert step.logprob_weight == pytest.approx(0.5 / step.std**2)
        density = math.exp(step.logprob_constant - step.logprob_weight * 0.3**2)
        expected = math.exp(-0.5 * (0.3 / step.std) ** 2) / (step.std * math.sqrt(2 * math.pi))
        assert density == pytest.approx(expected)
        assert step.kl_weight == pytest.approx(step.b**2 / (2 * rate**2))


@given(num=st.integers(3, 40), level=st.floats(0.05, 1.0), shift=st.sampled_from([1.0, 3.0]))
def test_cps_keeps_the_coefficients(num, level, shift):
    """The picture's share of x_next is 1 - t_next, and the noises' squares add up to t_next squared."""
    schedule = Schedule.build(num, shift).with_noise("cps", level)
    for step, t_next in zip(schedule.steps[:-1], schedule.times[1:-1], strict=True):
        picture, noise = 0.6, -1.1
        x, v = (1 - step.t) * picture + step.t * noise, noise - picture
        kept = math.sqrt(max(t_next**2 - step.std**2, 0.0))
        assert step.a * x + step.b * v == pytest.approx((1 - t_next) * picture + kept * noise)
        assert step.std == pytest.approx(t_next * math.sin(level * math.pi / 2))
        assert (step.logprob_weight, step.logprob_constant) == (1.0, 0.0)
    last = schedule.steps[-1]
    assert not last.has_logprob
    assert (last.a, last.b) == (1.0, last.dt)


def test_noise_keeps_to_its_window():
    plain = Schedule.build(10, 3.0)
    noisy = plain.with_noise("flow-grpo", 0.7, (2, 5))
    assert [step.has_logprob for step in noisy.steps] == [2 <= index < 5 for index in range(9)]
    assert noisy.steps[:2] + noisy.steps[5:] == plain.steps[:2] + plain.steps[5:]
    assert plain.with_noise("cps", 0.8, (3, 3)) == plain
    assert plain.with_noise("flow-grpo", 0.0) == plain
    assert noisy.steps[2].ratio_scale == noisy.steps[2].std
    assert noisy.steps[2].policy_weight == pytest.approx(-1 / noisy.steps[2].dt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddim", 0.5), "noise rule is 'ddim': must be one of flow-grpo, dance-grpo, cps"),
        (("flow-grpo", -0.1), "noise level is -0.1: must be a number from 0 up"),
        (("cps", 1.5), "noise level is 1.5: must be a number from 0 to 1"),
        (("flow-grpo", float("nan")), "noise level is nan"),
        (("flow-grpo", 0.5, (3, 12)), r"noise window is \(3, 12\): must lie within \(0, 9\)"),
        (("flow-grpo", 0.5, (4, 3)), r"noise window is \(4, 3\)"),
    ],
)
def test_impossible_noise_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule.build(10).with_noise(*arguments)
