"""The sampler's times, and for every step the numbers of `x_next = a * x + b * v + std * noise`.

t = 1 is noise, t = 0 the picture, `x_t = (1 - t) x_0 + t noise`, `v = noise - x_0`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Time = TypeVar("Time", float, Tensor)


@dataclass(frozen=True)
class Step:
    """One step from time `t` by `dt` (negative): `a`, `b`, `std` of `flow_step`."""

    t: float
    dt: float
    a: float
    b: float
    std: float


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
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps is {num_timesteps}: must be at least 2, for one step")
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"timestep shift is {shift}: must be a positive number; 1 leaves the times even")
        last = num_timesteps - 1
        times = tuple(shift_time(1 - i / last, shift) for i in range(num_timesteps))
        steps = tuple(Step(t, t_next - t, 1.0, t_next - t, 0.0) for t, t_next in pairwise(times))
        return cls(times, steps, shift)

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


def shift_time(u: Time, shift: float) -> Time:
    """`shift u / (1 + (shift - 1) u)`: keeps 0 and 1, and moves what lies between towards 1 if shift > 1."""
    return shift * u / (1 + (shift - 1) * u)
