"""Which steps are computed, and the weights of what stands in for the others."""

from __future__ import annotations

import math

import pytest

from realign.runtime.forecast import StepNeeds, extrapolate, plan_steps
from realign.runtime.schedule import Schedule
from realign.runtime.settings import CachingSettings

ALL = ("conditional", "text", "image")


def build_needs(num_timesteps=50, kinds=ALL, noisy=(), guided=(0.0, 1.0)):
    times = Schedule.build(num_timesteps).times[:-1]
    return [
        StepNeeds(t, kinds if guided[0] < t <= guided[1] else kinds[:1], step in noisy)
        for step, t in enumerate(times)
    ]


def list_computed(plans):
    return [step for step, plan in enumerate(plans) if plan.computed]


def run(plans, velocity):
    """Every velocity that a sampler would have: `velocity(kind, step)` where it is computed."""
    kept, found = {}, []
    for step, plan in enumerate(plans):
        own = {kind: velocity(kind, step) for kind in plan.computed}
        known = kept | {(kind, step): value for kind, value in own.items()}
        for kind in sorted(plan.forecast):
            own[kind] = sum(weight * known.get(s, own.get(s[0])) for s, weight in plan.forecast[kind].items())
        kept = {source: known[source] for source in plan.kept}
        found.append(own)
    return found


def test_by_default_every_step_is_computed_and_nothing_is_kept():
    for plan, need in zip(plan_steps(build_needs(), CachingSettings()), build_needs(), strict=True):
        assert plan.computed == need.kinds
        assert not plan.forecast
        assert not plan.kept
    assert not CachingSettings().is_on


def test_bagels_own_setting_computes_19_of_49_steps_and_here_the_last():
    plans = plan_steps(build_needs(), CachingSettings(interval=3, order=6, first=5))
    assert list_computed(plans) == [0, 1, 2, 3, *range(4, 49, 3), 48]
    assert len(list_computed(plans)) == 19 + 1
    assert max(len(plan.kept) for plan in plans) == 3 * 7  # order + 1 of each branch


@pytest.mark.parametrize("order", [0, 1, 2, 6])
def test_a_forecast_meets_a_line_and_of_order_0_a_constant(order):
    slope = -2.0 if order else 0.0
    plans = plan_steps(build_needs(30, ALL[:1]), CachingSettings(interval=4, order=order, first=2))
    assert any(not plan.computed for plan in plans)
    for step, own in enumerate(run(plans, lambda kind, step: 7.0 + slope * step)):
        assert own["conditional"] == pytest.approx(7.0 + slope * step)


def test_the_weights_are_the_papers():
    """Its recursion over values, at the distances it had, against the weights; and by hand."""
    assert extrapolate([4.0], 6.0) == [1.0]
    assert extrapolate([4.0, 7.0], 9.0) == pytest.approx([-2 / 3, 5 / 3])
    points, values = [0.0, 1.0, 4.0, 7.0, 10.0], [math.sin(p / 9) for p in (0, 1, 4, 7, 10)]
    factors: list[float] = []
    for index, (point, value) in enumerate(zip(points, values, strict=True)):
        updated = [value]
        for old in factors:
            updated.append((updated[-1] - old) / (point - points[index - 1]))
        factors = updated
    expected = sum(factor * 2.0**i / math.factorial(i) for i, factor in enumerate(factors))
    found = sum(w * v for w, v in zip(extrapolate(points, 12.0), values, strict=True))
    assert found == pytest.approx(expected, rel=1e-12)


def test_weights_of_any_points_sum_to_one():
    for count in range(1, 8):
        points = [0.0, 1.0, 2.0, 5.0, 8.0, 11.0, 14.0][:count]
        assert sum(extrapolate(points, points[-1] + 2.0)) == pytest.approx(1.0)


def test_a_branch_that_comes_late_is_computed_when_it_is_first_needed():
    """Guidance that begins below t = 0.9: the step is computed though it was not due."""
    needs = build_needs(guided=(0.3, 0.9))
    begins = next(step for step, need in enumerate(needs) if need.kinds == ALL)
    plans = plan_steps(needs, CachingSettings(interval=20, first=2))
    assert 2 < begins < 21
    assert list_computed(plans) == [0, 1, begins, begins + 20, 48]
    assert plans[begins].computed == ALL


def test_steps_with_noise_are_computed_and_nothing_is_forecast_across_them():
    noisy = (10, 11, 20)
    plans = plan_steps(
        build_needs(noisy=noisy), CachingSettings(interval=5, order=3, first=2, reuse_guidance_below=0.9)
    )
    for step in noisy:
        assert plans[step].computed == plans[step + 1].computed == ALL
    for step, plan in enumerate(plans):
        since = max((n for n in noisy if n < step), default=-1)
        assert all(source > since for weights in plan.forecast.values() for _, source in weights)


def test_guidance_that_is_reused_adds_what_it_last_added():
    below = 0.7
    needs = build_needs()
    plans = plan_steps(needs, CachingSettings(reuse_guidance_below=below))
    last = max(step for step, need in enumerate(needs) if need.t > below)
    offset = {"conditional": 0.0, "text": 1.0, "image": -2.0}

    def velocity(kind, step):
        return math.cos(step) + offset[kind] * (1 + step)

    for step, own in enumerate(run(plans, velocity)):
        assert plans[step].computed == (ALL if step <= last else ("conditional",))
        assert own["conditional"] == velocity("conditional", step)
        for kind in ALL[1:]:
            gap = offset[kind] * (1 + min(step, last))
            assert own[kind] == pytest.approx(own["conditional"] + gap)


def test_reuse_and_forecast_together():
    """Late, a forecast conditional velocity carries the difference; no unconditional branch runs."""
    needs = build_needs()
    plans = plan_steps(needs, CachingSettings(interval=3, reuse_guidance_below=0.7))
    for need, own, plan in zip(needs, run(plans, lambda kind, step: float(step)), plans, strict=True):
        assert set(own) == set(ALL)
        assert own["text"] == pytest.approx(own["conditional"])
        if need.t <= 0.7:
            assert plan.computed in ((), ("conditional",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interval": 0}, "caching interval is 0: must be at least 1"),
        ({"order": -1}, "caching order is -1: must be at least 0 and at most 8"),
        ({"order": 9}, "caching order is 9: must be at least 0 and at most 8"),
        ({"first": 0}, "caching first is 0: must be at least 1"),
        ({"reuse_guidance_below": 1.5}, "reuse_guidance_below is 1.5: must be a time from 0 to 1"),
        ({"reuse_guidance_below": math.nan}, "reuse_guidance_below is nan"),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        CachingSettings(**values)
