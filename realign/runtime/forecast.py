"""Step caching: which velocities of a schedule are computed, and how the others follow from those.

A velocity that is not computed is a weighted sum of velocities that were. A plan is thus numbers alone, made
on the host before the first step from one job's schedule and settings: it knows no neighbours.

What is forecast is the velocity of every branch. TaylorSeer (arXiv 2503.06923), whose weights these are,
forecasts what is computed within every layer: up to 5.76 GB a branch of BAGEL at 1024x1024, and some of the
forward pass is still run. A velocity there has 1 MB, and a step that is forecast runs no model. Forecasts
are linear and a layer only adds to the residual stream, so the two differ in little: the embeddings of the
present step's latents and time, and the last norm.

The differences are taken over the numbers of the steps, as in that paper: on mini they are as good as divided
differences in t up to order 1, and better above, because the schedule's steps grow as t falls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor

from realign.runtime.settings import CachingSettings

Source = tuple[str, int]  # a velocity that was computed: of which kind of branch, at which step
Weights = Mapping[Source, float]


@dataclass(frozen=True)
class StepPlan:
    """How the velocities of one step come about.

    Attributes:
        computed: the kinds of branches that run.
        forecast: for every other branch that the step needs, the velocities whose weighted sum it is; the
            conditional one of the step itself may be among them.
        kept: the velocities computed so far that later steps need.
    """

    computed: tuple[str, ...]
    forecast: Mapping[str, Weights] = field(default_factory=dict)
    kept: frozenset[Source] = frozenset()


@dataclass(frozen=True)
class StepNeeds:
    """What a step asks for: its time, the kinds of branches it needs, whether noise is added in it."""

    t: float
    kinds: tuple[str, ...]
    is_noisy: bool = False


def plan_steps(needs: Sequence[StepNeeds], caching: CachingSettings) -> tuple[StepPlan, ...]:
    """The plan of every step.

    Computed are the first steps, then every `interval`-th, and the last, which is the longest in t where the
    schedule is shifted (on mini it is worth 5 dB of PSNR); every step with noise, in full, so that its
    log-prob is the model's; and every step for which a branch has nothing to be forecast from, as after
    noise: forecasts follow a smooth path, and it starts anew there.
    """
    planner = _Planner(caching, len(needs))
    plans = [planner.plan(step, need) for step, need in enumerate(needs)]
    wanted: frozenset[Source] = frozenset()
    for step in reversed(range(len(plans))):
        plans[step] = replace(plans[step], kept=frozenset(source for source in wanted if source[1] <= step))
        wanted |= {source for weights in plans[step].forecast.values() for source in weights}
    return tuple(plans)


class _Planner:
    """What was computed so far, since the last noise, step by step."""

    def __init__(self, caching: CachingSettings, num_steps: int) -> None:
        self.caching, self.num_steps = caching, num_steps
        self.computed: dict[str, list[int]] = {}  # by kind
        self.last = -caching.interval

    def plan(self, step: int, need: StepNeeds) -> StepPlan:
        reused = [kind for kind in need.kinds if self._is_reused(kind, need)]
        fresh = tuple(kind for kind in need.kinds if kind not in reused)
        runs = fresh if self._is_computed(step, need, fresh) else ()
        for kind in runs:
            self.computed.setdefault(kind, []).append(step)
        forecast = {kind: self._forecast(kind, step) for kind in fresh if kind not in runs}
        conditional = forecast.get("conditional", {("conditional", step): 1.0})
        forecast |= {kind: self._shift(kind, conditional) for kind in reused}
        if runs:
            self.last = step
        if need.is_noisy:
            self.computed.clear()
        return StepPlan(runs, forecast)

    def _is_reused(self, kind: str, need: StepNeeds) -> bool:
        """Whether the branch is the conditional one, less their difference when it last ran."""
        is_late = need.t <= self.caching.reuse_guidance_below
        return kind != "conditional" and is_late and not need.is_noisy and kind in self.computed

    def _is_computed(self, step: int, need: StepNeeds, kinds: Sequence[str]) -> bool:
        is_first_or_last = step < self.caching.first or step == self.num_steps - 1
        is_due = is_first_or_last or step - self.last >= self.caching.interval
        return is_due or need.is_noisy or any(kind not in self.computed for kind in kinds)

    def _forecast(self, kind: str, step: int) -> Weights:
        steps = self.computed[kind][-self.caching.order - 1 :]
        weights = extrapolate(steps, step)
        return {(kind, source): weight for source, weight in zip(steps, weights, strict=True)}

    def _shift(self, kind: str, conditional: Weights) -> Weights:
        last = self.computed[kind][-1]
        weights = {**conditional, (kind, last): 1.0}
        weights["conditional", last] = weights.get(("conditional", last), 0.0) - 1.0
        return {source: weight for source, weight in weights.items() if weight}


def extrapolate(points: Sequence[float], at: float) -> list[float]:
    """The weights of values at `points`, ascending, in TaylorSeer's forecast of the value `at` a later one.

    `sum_i (at - p_n) ** i / i! * D_i(n)`, `D_0(k)` the value at `p_k`,
    `D_i(k) = (D_{i-1}(k) - D_{i-1}(k-1)) / (p_k - p_{k-1})`: of order `len(points) - 1`. Above order 1 it
    falls short of the polynomial through the points, whose weights grow out of hand: on mini, order 6 gives
    pictures of 31 dB so, and of 59 dB as it is here.
    """
    count, power = len(points), 1.0
    differences = [[float(row == column) for column in range(count)] for row in range(count)]  # D_0(0), ..
    weights = [0.0] * count
    for order in range(count):
        weights = [w + power * d for w, d in zip(weights, differences[-1], strict=True)]
        gaps = [points[k] - points[k - 1] for k in range(order + 1, count)]
        differences = [
            [(d - e) / gap for d, e in zip(here, before, strict=True)]
            for gap, (before, here) in zip(gaps, pairwise(differences), strict=True)
        ]
        power *= (at - points[-1]) / (order + 1)
    return weights


class VelocityHistory:
    """One job's velocities, step by step: those that were computed, and from them the others."""

    def __init__(self, plans: Sequence[StepPlan]) -> None:
        self.plans = plans
        self.kept: dict[Source, Tensor] = {}

    def complete(self, step: int, computed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All velocities that the step needs, by kind, from those that ran in it; to be called step by step.

        Args:
            computed: velocities [L, C] of `plans[step].computed`.
        """
        plan = self.plans[step]
        known = self.kept | {(kind, step): velocity_LC for kind, velocity_LC in computed.items()}
        forecast = {kind: _weighted_sum(known, weights) for kind, weights in plan.forecast.items()}
        self.kept = {source: known[source] for source in plan.kept}
        return {**computed, **forecast}


def _weighted_sum(known: Mapping[Source, Tensor], weights: Weights) -> Tensor:
    """In float32, number by number and in the order of the weights, so that a job's bits are its own."""
    first, *others = (weight * known[source].float() for source, weight in weights.items())
    for term in others:
        first = first + term
    return first.to(next(iter(known.values())).dtype)
