"""The sampler's times, and for every step the numbers of `x_next = a * x + b * v + std * noise`.

t = 1 is noise, t = 0 the picture, `x_t = (1 - t) x_0 + t noise`, `v = noise - x_0`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from realign.runtime.settings import check_noise, check_times
from realign_kernels import LogProbCoefficients, StepCoefficients

Time = TypeVar("Time", float, Tensor)


@dataclass(frozen=True)
class Step:
    """One step from time `t` by `dt` (negative): numbers that `flow_step`, `sde_logprob`, `grpo_loss` take.

    Attributes:
        a, b, std: `mean = a * x + b * v`, `x_next = mean + std * noise`.
        logprob_weight, logprob_constant: `logprob = constant - weight * mean((x_next - mean) ** 2)`.
        kl_weight: times `mean((v - v_reference) ** 2)`: the KL in mean space.
    """

    t: float
    dt: float
    a: float
    b: float
    std: float
    logprob_weight: float = 0.0
    logprob_constant: float = 0.0
    kl_weight: float = 0.0

    @property
    def has_logprob(self) -> bool:
        """A step without noise has no log-prob, and is never trained."""
        return self.std > 0

    @property
    def ratio_scale(self) -> float:
        """GRPO-Guard's factor of the log-ratio, the step's deviation (arXiv 2510.22319)."""
        return self.std

    @property
    def policy_weight(self) -> float:
        """GRPO-Guard's weight of the policy loss, `1 / -dt`."""
        return -1.0 / self.dt


@dataclass(frozen=True)
class Schedule:
    """Times from 1 to 0 (float64, on the host) and the steps between them.

    N "timesteps" are N - 1 steps: the last time, 0, is only arrived at.
    """

    times: tuple[float, ...]
    steps: tuple[Step, ...]
    shift: float

    @classmethod
    def build(cls, num_timesteps: int = 50, shift: float = 3.0) -> Schedule:
        """Euler steps of the ODE at `shift_time(u, shift)`, u evenly from 1 to 0 (a = 1, b = dt, std = 0).

        Raises: ValueError for fewer than two timesteps or a shift that is not a positive number.
        Source: BAGEL, arXiv 2505.14683, `Bagel.generate_image`.
        """
        check_times(num_timesteps, shift)
        last = num_timesteps - 1
        times = tuple(shift_time(1 - i / last, shift) for i in range(num_timesteps))
        steps = tuple(Step(t, t_next - t, 1.0, t_next - t, 0.0) for t, t_next in pairwise(times))
        return cls(times, steps, shift)

    def with_noise(self, rule: str, level: float, window: tuple[int, int] | None = None) -> Schedule:
        """The schedule with stochastic steps from `window[0]` to before `window[1]` (None: all of them).

        Args:
            rule: "flow-grpo" (arXiv 2505.05470, eq. 9), "dance-grpo" (arXiv 2505.07818), "cps" (arXiv
                2509.05952).
            level: how much noise: Flow-GRPO's and CPS's a, DanceGRPO's eta. 0 leaves the steps as they are.

        Raises: ValueError for an unknown rule, a negative level (CPS: over 1), a window outside the steps.
        """
        check_noise(rule, level)
        first, end = window or (0, self.num_steps)
        if not 0 <= first <= end <= self.num_steps:
            raise ValueError(f"noise window is ({first}, {end}): must lie within (0, {self.num_steps})")
        build = _build_cps_step if rule == "cps" else _build_sde_step
        noisy = [build(self, index, rule, level) for index in range(first, end)]
        return replace(self, steps=(*self.steps[:first], *noisy, *self.steps[end:]))

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    def guided_steps(self, interval: tuple[float, float]) -> tuple[bool, ...]:
        """For each step whether guidance is on: `lo < t <= hi`.

        Compared in float32, on times rounded as BAGEL rounds them: its answer where a time lies on a bound.
        """
        low, high = interval
        even = torch.linspace(1, 0, len(self.times))
        times = shift_time(even, self.shift)[:-1]
        return tuple(((times > low) & (times <= high)).tolist())


def stack_steps(steps: Sequence[Step], device: torch.device | str = "cpu") -> StepCoefficients:
    """The numbers of one step of each sample, as the ops take them. Where no step is noisy, std is None."""
    a_B, b_B, std_B = torch.tensor([[step.a, step.b, step.std] for step in steps]).T.contiguous().to(device)
    return StepCoefficients(a_B, b_B, std_B if any(step.std for step in steps) else None)


def stack_logprobs(steps: Sequence[Step], device: torch.device | str = "cpu") -> LogProbCoefficients:
    """The numbers of the log-prob of one step of each sample, as the ops take them."""
    numbers = [[step.logprob_weight, step.logprob_constant] for step in steps]
    return LogProbCoefficients(*torch.tensor(numbers).T.contiguous().to(device))


def _build_sde_step(schedule: Schedule, index: int, rule: str, level: float) -> Step:
    """Flow-GRPO's and DanceGRPO's step, which differ in the deviation per square root of time.

    Flow-GRPO's is `a sqrt(t / (1 - t))`, at t = 1 with the next time in the denominator; DanceGRPO's is eta.
    """
    if level == 0:
        return schedule.steps[index]
    t, t_next = schedule.times[index : index + 2]
    dt = t_next - t
    rate = level
    if rule == "flow-grpo":
        rate = level * math.sqrt(t / (1 - (schedule.times[1] if t == 1 else t)))
    drift = rate**2 * dt / (2 * t)
    std = rate * math.sqrt(-dt)
    return Step(
        t,
        dt,
        a=1 + drift,
        b=dt + drift * (1 - t),
        std=std,
        logprob_weight=1 / (2 * std**2),
        logprob_constant=-math.log(std) - math.log(2 * math.pi) / 2,
        kl_weight=(dt + drift * (1 - t)) ** 2 / (2 * rate**2),
    )


def _build_cps_step(schedule: Schedule, index: int, rule: str, level: float) -> Step:
    """CPS: the coefficients of picture and noise keep their squares' sum. The log-prob is the plain error."""
    t, t_next = schedule.times[index : index + 2]
    std = t_next * math.sin(level * math.pi / 2)
    if std == 0:
        return schedule.steps[index]
    kept = math.sqrt(t_next**2 - std**2)
    b = -t * (1 - t_next) + (1 - t) * kept
    return Step(
        t,
        t_next - t,
        a=1 - t_next + kept,
        b=b,
        std=std,
        logprob_weight=1.0,
        kl_weight=b**2 / (2 * std**2),
    )


def shift_time(u: Time, shift: float) -> Time:
    """`shift u / (1 + (shift - 1) u)`: keeps 0 and 1, and moves what lies between towards 1 if shift > 1."""
    return shift * u / (1 + (shift - 1) * u)
