"""What an iteration gave, and how far two of them are apart. N samples, S stochastic steps of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bench.generate.baseline import Made
from realign.evals.golden import relative_error


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an iteration gave.

    Attributes:
        made: of each sample.
        logprob_NS: as recorded while sampling.
        reward_N: of each sample.
        ratio_error: how far the first ratios are off one.
        gradients: of the weights, clipped, by their name in the model; empty where they are not kept.
    """

    made: list[Made]
    logprob_NS: Tensor
    reward_N: Tensor
    ratio_error: float
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreement:
    """How far two outcomes are apart.

    Attributes:
        latent_error: largest difference of final latents, relative to a sample's largest.
        picture_levels: largest difference of pictures, of 255.
        logprob_error, reward_error: largest differences.
        gradient_error: norm of the difference over the norm, of all weights together.
    """

    latent_error: float
    picture_levels: int
    logprob_error: float
    reward_error: float
    gradient_error: float


# What is allowed in float32. Pictures: rounding, where a level lies between two. Rewards follow the pictures.
# Gradients: a reward's difference is divided by the spread of its group, which is small.
BOUNDS = Agreement(1e-4, 1, 1e-6, 1e-4, 1e-3)


def compare(ours: Outcome, theirs: Outcome) -> Agreement:
    """Raises: ValueError where samples wrote different texts: nothing can be compared then."""
    pairs = list(zip(ours.made, theirs.made, strict=True))
    for number, (one, other) in enumerate(pairs):
        if one.turn != other.turn:
            raise ValueError(f"sample {number}: one wrote {one.turn}, the other {other.turn}: no time counts")
    levels = [
        np.abs(np.subtract(*(np.asarray(made.image).astype(int) for made in pair))).max() for pair in pairs
    ]
    return Agreement(
        max(relative_error(one.latent_LC, other.latent_LC.cpu()) for one, other in pairs),
        int(max(levels)),
        float((ours.logprob_NS - theirs.logprob_NS).abs().max()),
        float((ours.reward_N - theirs.reward_N).abs().max()),
        _compare_gradients(ours.gradients, theirs.gradients),
    )


def check(found: Agreement, bounds: Agreement = BOUNDS) -> None:
    """Raises: ValueError naming what is further apart than allowed."""
    for name, bound in vars(bounds).items():
        value = getattr(found, name)
        if not value <= bound:
            raise ValueError(
                f"{name} of ours and the baseline's is {value:.2g}, over {bound:g}: no time counts"
            )


def _compare_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    if ours.keys() != theirs.keys():
        raise ValueError(f"not the same weights are trained: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    one, other = (torch.cat([own[name].double().flatten().cpu() for name in ours]) for own in (ours, theirs))
    return float((one - other).norm() / other.norm())
