"""Rollouts: prompts times G samples, sampled with noise in a window of steps, and their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from realign.reasoning.programs import PROGRAMS
from realign.rewards.base import Scored, WeightedSum
from realign.runtime.engine import Engine
from realign.runtime.request import Request, Sample, TextPart
from realign.runtime.settings import GuidanceSettings, NoiseSettings, Settings, TextSettings
from realign.runtime.stream import StreamOptions
from train.prompts import Item, Source, choose_items
from train.ranks import Ranks

WINDOW_MOVES = ("random", "slide")


@dataclass(frozen=True)
class WindowOptions:
    """The steps that add noise, and how they move from iteration to iteration. All groups of an iteration
    have the same, so that they are noisy, and replayed, in the same forwards.

    Attributes:
        rule, level: as `NoiseSettings`.
        size: steps in the window.
        first, end: the range of steps that it lies within; end None: to before the last step, which ends at
            the picture, and where CPS adds no noise.
        move: "random": anywhere in the range, anew each iteration (Flow-GRPO-Fast); "slide": from the
            beginning of the range to its end, by `stride` steps every `every` iterations, and then again
            (MixGRPO).
    """

    rule: str = "cps"
    level: float = 0.8
    size: int = 2
    first: int = 0
    end: int | None = None
    move: str = "random"
    every: int = 25
    stride: int = 1

    def __post_init__(self) -> None:
        NoiseSettings(self.rule, self.level)
        if not self.level > 0:
            raise ValueError(f"window level is {self.level}: must be above 0, or there is no log-prob")
        if self.move not in WINDOW_MOVES:
            raise ValueError(f"window move is {self.move!r}: must be one of {', '.join(WINDOW_MOVES)}")
        for name in ("size", "every", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"window {name} is {getattr(self, name)}: must be at least 1")

    def count_places(self, num_steps: int) -> int:
        """In how many places the window can be. Raises: ValueError where it fits in none."""
        end = num_steps - 1 if self.end is None else self.end
        most = num_steps - (self.rule == "cps")
        if not 0 <= self.first <= end - self.size <= most - self.size:
            what = f"window of {self.size} steps from {self.first} to before {end}"
            raise ValueError(
                f"{what}: it must fit in there, and that in the first {most} steps, which have noise"
            )
        return end - self.size - self.first + 1

    def place(self, seed: int, iteration: int, num_steps: int) -> NoiseSettings:
        """The noise of an iteration."""
        count = self.count_places(num_steps)
        if self.move == "random":
            offset = int(np.random.default_rng([seed, iteration]).integers(count))
        else:
            offset = iteration // self.every * self.stride % count
        return NoiseSettings(self.rule, self.level, (self.first + offset, self.size))


@dataclass(frozen=True)
class RolloutOptions:
    """How many samples an iteration has, and how they are made.

    Attributes:
        prompts, group: prompts an iteration, samples of each.
        reasoning: a mode of `realign generate`.
        shared_chain: all samples of a group get one reasoning chain; else each writes its own (RID).
        height, width: pixels; None: the model's own.
        text_scale, image_scale, interval: guidance; a text_scale of 1 is none.
        batch_size: pictures in one call at most; None: as many as memory holds.
    """

    prompts: int = 8
    group: int = 8
    reasoning: str = "ic-cot"
    shared_chain: bool = False
    height: int | None = None
    width: int | None = None
    num_timesteps: int = 15
    timestep_shift: float = 3.0
    text_scale: float = 1.0
    image_scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.prompts < 1 or self.group < 2:
            raise ValueError(
                f"rollout has {self.prompts} prompts and groups of {self.group}: must be at least 1 and 2"
            )
        if self.reasoning not in PROGRAMS:
            raise ValueError(f"rollout reasoning is {self.reasoning!r}: must be one of {', '.join(PROGRAMS)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"rollout batch_size is {self.batch_size}: must be at least 1")
        self.settings(NoiseSettings())

    @property
    def num_steps(self) -> int:
        return self.num_timesteps - 1

    @property
    def num_samples(self) -> int:
        return self.prompts * self.group

    def settings(self, noise: NoiseSettings) -> Settings:
        """Of every request."""
        guidance = GuidanceSettings(self.text_scale, self.image_scale, tuple(self.interval))
        text = TextSettings(self.max_tokens, self.temperature, self.top_p)
        size = (self.height, self.width, self.reasoning, self.num_timesteps, self.timestep_shift)
        return Settings(*size, guidance, text, noise=noise)


@dataclass(eq=False)
class Rollout:
    """A sample, the number of its group in the iteration, and its prompt."""

    group: int
    item: Item
    sample: Sample

    @property
    def number(self) -> int:
        """Among all samples of the iteration, on whatever process."""
        return int(self.sample.request.id.rpartition("/")[2])

    def to_scored(self) -> Scored:
        """As rewards take it."""
        request, reasoning = self.sample.request, self.sample.reasoning
        return Scored(
            name=request.id,
            picture=self.sample.picture,
            prompt="\n".join(part.text for part in request.prompt.parts if isinstance(part, TextPart)),
            reasoning=None if reasoning is None else reasoning.text,
            caption=None if reasoning is None else reasoning.caption,
            is_malformed=reasoning is not None and reasoning.error is not None,
            references=request.prompt.pictures,
            instruction=self.item.instruction,
        )

    def leave_device(self) -> None:
        """The picture is on the host from now on."""
        self.sample = replace(self.sample, picture=self.sample.image)


class Roller:
    """Makes the rollouts of any iteration with an engine: a function of iteration, seed and weights."""

    def __init__(
        self, engine: Engine, source: Source, options: RolloutOptions, window: WindowOptions, seed: int
    ) -> None:
        assert engine.record
        self.engine, self.source, self.options = engine, source, options
        self.window, self.seed = window, seed
        window.count_places(options.num_steps)

    def roll(self, iteration: int, numbers: Sequence[int]) -> list[Rollout]:
        """The samples with these numbers, from 0 to `options.num_samples - 1`: a group's lie together."""
        items = choose_items(self.source, self.seed, iteration, self.options.prompts)
        settings = self.options.settings(self.window.place(self.seed, iteration, self.options.num_steps))
        groups = [number // self.options.group for number in numbers]
        requests = [
            Request(f"{iteration}/{number}", items[group].prompt, self.seed, settings)
            for number, group in zip(numbers, groups, strict=True)
        ]
        if self.options.shared_chain and self.options.reasoning != "none":
            requests = self._share_chains(requests, groups, iteration)
        samples = self.engine.run(requests, StreamOptions(batch_size=self.options.batch_size))
        return [Rollout(g, items[g], sample) for g, sample in zip(groups, samples, strict=True)]

    def _share_chains(
        self, requests: Sequence[Request], groups: Sequence[int], iteration: int
    ) -> list[Request]:
        """Each group's texts are written once, for a picture as small as can be, which is thrown away."""
        side = self.engine.model.config.latent_stride
        first = dict(zip(reversed(groups), reversed(requests), strict=True))
        writers = [
            Request(
                f"{iteration}/chain/{group}",
                request.prompt,
                self.seed,
                replace(request.settings, height=side, width=side, num_timesteps=2, noise=NoiseSettings()),
            )
            for group, request in first.items()
        ]
        written = dict(zip(first, self.engine.run(writers), strict=True))
        return [
            replace(request, turns=written[group].trajectory.text_turns)
            for request, group in zip(requests, groups, strict=True)
        ]


def cut_parts(options: RolloutOptions, num_parts: int, ranks: Ranks) -> list[list[int]]:
    """The numbers of the samples of each update, those that fall to this process: whole groups together as
    far as that goes.
    """
    parts = np.array_split(np.arange(options.num_samples), num_parts)
    return [np.array_split(part, ranks.size)[ranks.rank].tolist() for part in parts]


def score(reward: WeightedSum, rollouts: Sequence[Rollout]) -> Tensor:
    """The terms of the reward, float32 [N, R], not weighted.

    Rewards see the pictures where they were made. Then these leave the device: on it they would lie through
    the update, 3 GB of 1,024 pictures of 1024x1024.
    """
    if not rollouts:
        return torch.empty(0, len(reward.terms))
    parts = reward.score_parts([rollout.to_scored() for rollout in rollouts])
    for rollout in rollouts:
        rollout.leave_device()
    return torch.stack(list(parts.values()), dim=1)
