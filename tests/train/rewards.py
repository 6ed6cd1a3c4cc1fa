"""Rewards for tests, as users write them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from realign.rewards.base import Scored


def brightness(samples: Sequence[Scored]) -> list[float]:
    """The mean level of a picture, 0 to 1."""
    return [float(np.asarray(sample.picture).mean() / 255) for sample in samples]


def redness(samples: Sequence[Scored]) -> list[float]:
    """How far red is above blue, -1 to 1."""
    levels = [np.asarray(sample.picture).mean((0, 1)) / 255 for sample in samples]
    return [float(red - blue) for red, _, blue in levels]


def blueness(samples: Sequence[Scored]) -> list[float]:
    return [-level for level in redness(samples)]


def constant(samples: Sequence[Scored]) -> list[float]:
    return [0.5] * len(samples)


def broken(samples: Sequence[Scored]) -> list[float]:
    return [float("nan")] * len(samples)


def second_group(samples: Sequence[Scored]) -> list[float]:
    """Brightness, but for the first group of three of an iteration, whose samples are all alike."""
    levels = brightness(samples)
    numbers = [int(sample.name.rpartition("/")[2]) for sample in samples]
    return [level * (number >= 3) for level, number in zip(levels, numbers, strict=True)]


def evenness(samples: Sequence[Scored]) -> list[float]:
    """The share of characters with an even number in the reasoning; 0 where there are none."""
    texts = [sample.reasoning for sample in samples]
    return [sum(ord(c) % 2 == 0 for c in text) / max(len(text), 1) for text in texts]
