"""Held-out evaluation: the averaged weights on prompts that training never sees, without noise in the steps.

Every evaluation of a run has the same prompts and the same initial noise, so two of them are compared sample
by sample. P prompts, S samples of each, N = P * S; R terms of the reward.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from realign.rewards.base import WeightedSum
from realign.rewards.spec import parse_spec
from realign.runtime.engine import Engine
from realign.runtime.request import ImagePart, Prompt, Reasoning, Request
from realign.runtime.settings import NoiseSettings, Settings
from realign.runtime.stream import StreamOptions
from train.prompts import DataOptions, build_source
from train.ranks import Ranks
from train.rollouts import Rollout, RolloutOptions, score

SCORED_TOGETHER = 64
ROLLOUT_NAMES = (
    "num_timesteps", "timestep_shift", "text_scale", "image_scale", "interval", "temperature",
)  # fmt: skip


@dataclass(frozen=True)
class EvaluationOptions:
    """When and on what a run is measured.

    Attributes:
        every: iterations from one evaluation to the next; there is one before the first and after the last.
        prompts: a file that `realign generate` reads; else samples of the world.
        tasks, split: of the world; no tasks are those of the recipe's data.
        num_prompts: the first so many of the file, or of the world's split.
        samples: pictures a prompt.
        reward: as the recipe's, which it is by default.
        num_timesteps, timestep_shift, text_scale, image_scale, interval: None are those of the rollouts.
        temperature: of the reasoning; 0 takes the likeliest tokens.
        seed: of the prompts and the noise.
        shown: prompts whose pictures are kept and shown.
    """

    every: int
    prompts: str | None = None
    tasks: tuple[str, ...] = ()
    split: str = "val"
    num_prompts: int = 64
    samples: int = 1
    reward: str | None = None
    num_timesteps: int | None = None
    timestep_shift: float | None = None
    text_scale: float | None = None
    image_scale: float | None = None
    interval: tuple[float, float] | None = None
    temperature: float = 0.0
    seed: int = 0
    shown: int = 16

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("num_prompts", 1), ("samples", 1), ("shown", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation {name} is {getattr(self, name)}: must be at least {least}")
        if self.prompts is not None and self.tasks:
            what = f"evaluation has prompts {self.prompts!r} and tasks {list(self.tasks)}"
            raise ValueError(f"{what}: give one of them")
        if self.reward is not None:
            parse_spec(self.reward)

    def find_data(self, training: DataOptions) -> DataOptions:
        """What the prompts are drawn from. Raises: ValueError where they would not be held out."""
        if self.prompts is not None:
            if training.prompts == self.prompts:
                raise ValueError(f"evaluation prompts is {self.prompts!r}, as data's: name another file")
            return DataOptions(prompts=self.prompts)
        tasks = self.tasks or training.tasks
        if not tasks:
            raise ValueError("evaluation has neither prompts nor tasks: give a file of held-out prompts")
        if training.tasks and training.split == self.split:
            raise ValueError(f"evaluation split is {self.split!r}, as data's: name another")
        return DataOptions(tasks=tasks, num_prompts=self.num_prompts, split=self.split)

    def settings(self, rollout: RolloutOptions) -> Settings:
        """Of every request."""
        own = {name: getattr(self, name) for name in ROLLOUT_NAMES}
        given = {name: value for name, value in own.items() if value is not None}
        return replace(rollout, **given).settings(NoiseSettings())


@dataclass(frozen=True, eq=False)
class Shown:
    """What is shown of a sample."""

    picture: Image.Image
    prompt: Prompt


@dataclass(frozen=True, eq=False)
class Judged:
    """A sample, by its number from 0 to N - 1: its terms of the reward, not weighted, and its reasoning."""

    number: int
    scores: tuple[float, ...]
    reasoning: Reasoning | None
    shown: Shown | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All samples, in order, the same in every process.

    Attributes:
        names, weights: of the reward's terms.
        samples: pictures a prompt.
        seconds: that it took.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    samples: int
    judged: tuple[Judged, ...]
    seconds: float

    def find_reward(self, judged: Judged) -> float:
        return sum(weight * value for weight, value in zip(self.weights, judged.scores, strict=True))

    def name(self, judged: Judged) -> tuple[str, int]:
        """A prompt's number, as text, and a sample's number among those of its prompt."""
        prompt, index = divmod(judged.number, self.samples)
        return f"{prompt:03d}", index

    def describe(self, base: Sequence[float] | None = None) -> dict[str, Any]:
        """Its row: the mean reward with its standard error over prompts, each term, malformed reasoning; and
        the gain over `base`, rewards [N] of an earlier one, with the standard error of paired differences.
        """
        reward_N = [self.find_reward(judged) for judged in self.judged]
        mean, se = self._average(reward_N)
        row: dict[str, Any] = {"reward": mean, "se": se, "n": len(reward_N)}
        if base is not None:
            gain, gain_se = self._average([new - old for new, old in zip(reward_N, base, strict=True)])
            row |= {"gain": gain, "gain_se": gain_se}
        if len(self.names) > 1:
            scores_RN = zip(*(judged.scores for judged in self.judged), strict=True)
            row["rewards"] = {n: float(np.mean(s)) for n, s in zip(self.names, scores_RN, strict=True)}
        failures = [j.reasoning.error is not None for j in self.judged if j.reasoning is not None]
        if failures:
            row["failures"] = float(np.mean(failures))
        return row | {"seconds": round(self.seconds, 3)}

    def _average(self, value_N: Sequence[float]) -> tuple[float, float]:
        """Mean, and standard error over prompts: samples of one prompt are no independent draws."""
        mean_P = np.asarray(value_N, np.float64).reshape(-1, self.samples).mean(1)
        deviation = float(mean_P.std(ddof=1)) if len(mean_P) > 1 else 0.0
        return float(mean_P.mean()), deviation / math.sqrt(len(mean_P))


class Evaluator:
    """Evaluates the weights that an engine has, the work spread over the processes."""

    def __init__(
        self,
        engine: Engine,
        reward: WeightedSum,
        options: EvaluationOptions,
        data: tuple[DataOptions, RolloutOptions],
        ranks: Ranks,
    ) -> None:
        training, rollout = data
        self.engine, self.reward, self.options, self.ranks = engine, reward, options, ranks
        source = build_source(options.find_data(training), options.seed)
        self.items = [source[i] for i in range(min(len(source), options.num_prompts))]
        self.settings = options.settings(rollout)
        self.stream = StreamOptions(batch_size=rollout.batch_size)

    def evaluate(self) -> Evaluation:
        """One evaluation. Raises: RewardError."""
        began = time.perf_counter()
        numbers = np.arange(len(self.items) * self.options.samples)
        own = np.array_split(numbers, self.ranks.size)[self.ranks.rank].tolist()
        judged = self.ranks.gather_list([one for batch in self._make(own) for one in self._judge(batch)])
        names = tuple(term.name for term, _ in self.reward.terms)
        weights = tuple(float(weight) for _, weight in self.reward.terms)
        in_order = tuple(sorted(judged, key=lambda one: one.number))
        return Evaluation(names, weights, self.options.samples, in_order, time.perf_counter() - began)

    def _make(self, numbers: Sequence[int]) -> Iterator[list[tuple[int, Rollout]]]:
        """Samples by their numbers, some at a time, as they are done."""
        requests = {f"evaluation/{number}": number for number in numbers}
        prompts = {number: number // self.options.samples for number in numbers}
        samples = self.engine.stream(
            [
                Request(name, self.items[prompts[number]].prompt, self.options.seed, self.settings)
                for name, number in requests.items()
            ],
            self.stream,
        )
        while batch := list(islice(samples, SCORED_TOGETHER)):
            made = [(requests[sample.request.id], sample) for sample in batch]
            yield [(n, Rollout(prompts[n], self.items[prompts[n]], sample)) for n, sample in made]

    def _judge(self, batch: Sequence[tuple[int, Rollout]]) -> Iterator[Judged]:
        scores_NR = score(self.reward, [rollout for _, rollout in batch]).tolist()
        for (number, rollout), scores in zip(batch, scores_NR, strict=True):
            sample, is_shown = rollout.sample, rollout.group < self.options.shown
            shown = Shown(sample.image, _freeze(rollout.item.prompt)) if is_shown else None
            yield Judged(number, tuple(scores), sample.reasoning, shown)


def _freeze(prompt: Prompt) -> Prompt:
    """With pictures that are read, and so can be sent to another process."""
    parts = [
        ImagePart(part.image.convert("RGB")) if isinstance(part, ImagePart) else part for part in prompt.parts
    ]
    return Prompt(tuple(parts))
