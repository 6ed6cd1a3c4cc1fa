"""Measures an iteration, or scoring alone: ours and the reference trainers' way in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.align.baseline import ReferenceTrainer
from bench.align.flops import count_iteration
from bench.align.ours import Ours, build_clock
from bench.align.outcome import Outcome, check, compare
from bench.align.report import Report
from bench.align.rows import ITERATION, SCORING
from bench.align.scoring import OneByOne
from bench.generate.clock import Clock, NoClock
from bench.generate.measure import Measured, Run, take_turns
from realign.model.bagel import Bagel
from realign.rewards.base import Scored
from realign.rewards.clip import ClipReward
from realign.runtime.prepare import to_picture
from train.recipe import Recipe

CPU = torch.device("cpu")
# The baseline's pictures were cut to 8 bits; on a GPU both are encoded in bfloat16.
SCORE_TOLERANCE = 0.03


def describe(recipe: Recipe) -> str:
    """The sizes of an iteration."""
    rollout, policy = recipe.rollout, recipe.policy
    trained = f"LoRA of rank {policy.rank}" if policy.kind == "lora" else "the generation expert"
    return (
        f"{rollout.prompts} prompts x {rollout.group} samples, reasoning {rollout.reasoning}, "
        f"{rollout.num_timesteps} timesteps, window {recipe.window.size} ({recipe.window.rule}), "
        f"{trained}, one update, reward {':'.join(recipe.reward.split(':')[:2])}"
    )


def measure_with_baseline(recipe: Recipe, variant: str, num_turns: int, clip: str) -> Report:
    """The first iteration of a recipe on a CPU, again and again from the same weights.

    Args:
        clip: the reward's model, as `OneByOne` takes it.

    Raises: ValueError where both do not give the same: then no time is worth a row.
    """
    ours = Ours(recipe, CPU)
    ours.iterate(NoClock())  # what happens once happens here, and the requests are known then
    requests, score = ours.requests, OneByOne(clip, CPU)
    trainers = [ReferenceTrainer(load_start(recipe), recipe, score)]
    trainers[0].iterate(requests[:1], NoClock())

    def begin_again() -> None:
        trainers[:] = [ReferenceTrainer(load_start(recipe), recipe, score)]

    def iterate(clock: Clock | NoClock) -> Outcome:
        return trainers[0].iterate(requests, clock)

    measured = Measured(
        Run(ours.iterate, prepare=ours.reset, build_clock=build_clock),
        Run(iterate, prepare=begin_again, build_clock=build_clock),
    )
    take_turns(measured, CPU, num_turns)
    agreement = compare(measured.engine.made, measured.baseline.made)
    check(agreement)
    flops = count_flops(ours, measured.engine.made)
    return Report(ITERATION, variant, describe(recipe), measured, flops, agreement)


def measure_alone(recipe: Recipe, model: Bagel, variant: str, num_turns: int) -> Report:
    """Iterations of a recipe that go on from each other, without a baseline."""
    ours = Ours(recipe, model.device, model, keeps_gradients=False)
    ours.iterate(NoClock())
    measured = Measured(Run(ours.iterate, build_clock=build_clock))
    take_turns(measured, model.device, num_turns)
    return Report(ITERATION, variant, describe(recipe), measured, count_flops(ours, measured.engine.made))


def load_start(recipe: Recipe) -> Bagel:
    """What a recipe begins from."""
    return Bagel.from_pretrained(recipe.start, CPU, getattr(torch, recipe.dtype))


def count_flops(ours: Ours, outcome: Outcome) -> int:
    """Of the last iteration."""
    requests = [request for _, request in ours.requests]
    flops = count_iteration(ours.aligner.engine.model, requests, outcome.made, ours.recipe.policy.kind)
    return sum(flops.values())


class Scoring:
    """Pictures that lie on the device, as the autoencoder gives them, each with a caption of its own."""

    def __init__(self, spec: str, device: torch.device, count: int, side: int) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        shape = (count, 3, side, side)
        self.pictures = torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1).to(dtype)
        self.reward, self.one_by_one = ClipReward(spec, device), OneByOne(spec, device, dtype)
        self.num_done = 0

    def score(self, clock: Clock | NoClock) -> Outcome:
        """All pictures; captions that were not there before."""
        self.num_done += 1
        samples = [
            Scored(str(number), picture, caption=self._caption(number))
            for number, picture in enumerate(self.pictures)
        ]
        with clock.phase("reward"):
            return _to_outcome(self.reward.score(samples))

    def score_one_by_one(self, count: int, clock: Clock | NoClock) -> Outcome:
        """The first pictures, through PIL; with the captions of the last call of `score`."""
        with clock.phase("reward"):
            scores = [
                self.one_by_one.score(to_picture(picture), self._caption(number))
                for number, picture in enumerate(self.pictures[:count])
            ]
        return _to_outcome(torch.tensor(scores))

    def _caption(self, number: int) -> str:
        return f"a red circle at the left, number {number} of {self.num_done}"


def measure_scoring(spec: str, device: torch.device, sizes: tuple[int, int, int], num_turns: int) -> Report:
    """Scoring of so many pictures, so many of them by the baseline, of so many pixels a side."""
    count, num_baseline, side = sizes
    scoring = Scoring(spec, device, count, side)
    ours: Callable[[Clock | NoClock], Outcome] = scoring.score
    theirs = partial(scoring.score_one_by_one, num_baseline)
    ours(NoClock()), theirs(NoClock())
    scale = count / num_baseline
    measured = Measured(Run(ours, build_clock=build_clock), Run(theirs, scale, build_clock=build_clock))
    take_turns(measured, device, num_turns)
    scores = [run.made.reward_N[:num_baseline] for run in (measured.engine, measured.baseline)]
    error = float((scores[0] - scores[1]).abs().max())
    if not error <= SCORE_TOLERANCE:
        raise ValueError(f"scores of ours and the baseline's differ by {error:.2g}: no time counts")
    what = (
        f"{count} pictures of {side}x{side} on the device ({num_baseline} by the baseline), captions all new"
    )
    return Report(SCORING, f"{side}x{side}", what, measured)


def _to_outcome(score_N: torch.Tensor) -> Outcome:
    return Outcome([], score_N[:, None], score_N, 0.0)
