"""Times, steps and the guidance interval against BAGEL's float32 loop."""

from __future__ import annotations

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
