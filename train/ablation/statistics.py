"""Means over seeds and scenes, with standard errors that count both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} +- {self.error:.2f}"


def estimate(values_SN: np.ndarray) -> Estimate:
    """The mean over seeds (rows) and scenes (columns), both of which could have been others.

    The variance is clustered both ways: that of the seeds' means, plus that of the scenes' means, less that
    of single numbers, which both contain (Cameron, Gelbach and Miller, "Robust inference with multiway
    clustering", 2011, equation 2.11); where that is negative, the larger of the first two. One seed: that of
    scenes alone.
    """
    scenes = _variance_of_mean(values_SN.mean(0))
    if len(values_SN) == 1:
        return Estimate(float(values_SN.mean()), scenes**0.5)
    seeds = _variance_of_mean(values_SN.mean(1))
    single = float(values_SN.var(ddof=1)) / values_SN.size
    both = seeds + scenes - single
    return Estimate(float(values_SN.mean()), (both if both > 0 else max(seeds, scenes)) ** 0.5)


def _variance_of_mean(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0
