"""What is measured of a model: on the same test scenes, with the same noise, whatever the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import realign
from realign.api import Generator
from realign.evals.world import build_request
from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.rewards.base import WeightedSum
from realign.rewards.clip import ClipEncoder
from realign.rewards.spec import build_reward
from realign.runtime.engine import Engine
from realign.runtime.request import Sample
from realign.runtime.settings import NoiseSettings, Settings, TextSettings
from realign.world.oracle import Reading, judge, read_pictures
from realign.world.render import SIZE
from realign.world.scene import Object
from realign.world.tasks import WorldSample, sample
from realign_kernels import clip_score
from train.measure import measure_chains, measure_spreads
from train.prompts import DataOptions, Item, build_source
from train.ranks import Ranks
from train.recipe import Recipe
from train.rollouts import Roller, Rollout, score

POINTS = 10.0  # OmniContext's scale
PERCENT = 100.0


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured: `num` scenes of each task of `split`; timesteps of a picture."""

    tasks: tuple[str, ...] = ("in_context",)
    split: str = "test"
    num: int = 1024
    steps: int = 25
    clip: str = "mini"

    @property
    def groups(self) -> int:
        """How many the spread of rewards is measured on."""
        return max(1, self.num // 16)


def measure(
    model: Path, reasoning: str, recipe: Recipe, options: MeasureOptions, device: str
) -> dict[str, Any]:
    """Pictures of test scenes, guided as alignment's are and once more as `realign generate` guides them; and
    groups as alignment samples them.

    Args:
        model: folder.
        reasoning: the mode that the model is used in.
        recipe: of alignment: its guidance, and how groups are sampled.

    Returns: for each scene "following", "consistency" and "overall" (0 to 10), "all_right", "clip" (cosine to
        the true caption, times 100), "overall_guided"; with reasoning also "own_caption" (the cosine to the
        caption that it wrote) and, of each group, that cosine's "spread", and "distinct".
    """
    generator = realign.load(model, device=device)
    drawn = [sample(task, i, 0, options.split) for task in options.tasks for i in range(options.num)]
    settings = Settings(SIZE, SIZE, reasoning, options.steps, text=TextSettings(recipe.rollout.max_tokens))
    guided = make_pictures(generator, drawn, settings)
    own_guidance = recipe.rollout.settings(NoiseSettings()).guidance
    made = make_pictures(generator, drawn, replace(settings, guidance=own_guidance))
    found: dict[str, Any] = judge_pictures(drawn, made)
    found["overall_guided"] = judge_pictures(drawn, guided)["overall"]
    found["clip"] = score_captions(drawn, made, ClipEncoder(options.clip, device))
    if reasoning != "none":
        reward = build_reward(f"clip:{options.clip}", device)
        found |= {"own_caption": score_reward(drawn, made, reward)}
        found |= measure_groups(generator.model, reward, recipe, options)
    return found


def make_pictures(generator: Generator, drawn: Sequence[WorldSample], settings: Settings) -> list[Sample]:
    """A picture of each prompt; its noise is the scene's."""
    return generator.engine.run(
        [build_request(one, f"{one.task}/{i}", settings, 0) for i, one in enumerate(drawn)]
    )


def judge_pictures(drawn: Sequence[WorldSample], made: Sequence[Sample]) -> dict[str, list[float]]:
    """The oracle's numbers, a scene each; prompt following is the mean of `Verdict.parts`."""
    readings = read_pictures([np.asarray(one.image) for one in made])
    verdicts = [judge(reading, one.instruction) for reading, one in zip(readings, drawn, strict=True)]
    following = [POINTS * float(np.mean(verdict.parts)) for verdict in verdicts]
    consistency = [POINTS * rate_consistency(r, one) for r, one in zip(readings, drawn, strict=True)]
    return {
        "following": following,
        "consistency": consistency,
        "overall": [(f * c) ** 0.5 for f, c in zip(following, consistency, strict=True)],
        "all_right": [float(verdict.all_right) for verdict in verdicts],
    }


def rate_consistency(reading: Reading, drawn: WorldSample) -> float:
    """Subject consistency: the mean over the references of whether what they show is in the picture.

    Of an object that is its shape and colour, wherever it stands; of a background, that it is there; of a
    picture to edit, the share of what had to stay that is where and as it was.
    """
    return float(np.mean([_keeps(reading, drawn, number) for number in range(len(drawn.references))]))


def _keeps(reading: Reading, drawn: WorldSample, number: int) -> float:
    shows, scene = drawn.references[number].shows, reading.scene
    if drawn.task == "edit" and number == 0:
        kept = [any(map(spec.admits, scene.objects)) for spec in drawn.instruction.specs if spec.preserved]
        if not drawn.instruction.changes_background:
            kept.append(scene.background == drawn.instruction.background)
        return float(np.mean(kept)) if kept else 1.0
    if isinstance(shows, Object):
        return float(any(thing.name == shows.name for thing in scene.objects))
    return float(scene.background == shows)


def score_captions(drawn: Sequence[WorldSample], made: Sequence[Sample], encoder: ClipEncoder) -> list[float]:
    """Cosines, times 100, to the caption of the scene that the prompt was drawn from."""
    picture_ND = encoder.encode_pictures([one.image for one in made])
    text_ND = encoder.encode_texts([one.iccot.caption for one in drawn])
    return (PERCENT * clip_score(picture_ND, text_ND)).tolist()


def score_reward(drawn: Sequence[WorldSample], made: Sequence[Sample], reward: WeightedSum) -> list[float]:
    """The reward of each picture."""
    items = [Item(one.request.prompt, asked.instruction) for asked, one in zip(drawn, made, strict=True)]
    pairs = zip(items, made, strict=True)
    return total(reward, [Rollout(number, *pair) for number, pair in enumerate(pairs)])


def measure_groups(
    model: Bagel, reward: WeightedSum, recipe: Recipe, options: MeasureOptions
) -> dict[str, list[float]]:
    """The standard deviation of rewards within each group, and its share of distinct chains."""
    data = DataOptions(tasks=options.tasks, split=options.split, num_prompts=options.groups)
    rollout = replace(recipe.rollout, prompts=options.groups)
    engine = Engine(model, PROGRAMS, record=True)
    roller = Roller(engine, build_source(data, 0), rollout, recipe.window, 0)
    rollouts = roller.roll(0, range(rollout.num_samples))
    group_N = torch.tensor([one.group for one in rollouts])
    spread_G = measure_spreads(torch.tensor(total(reward, rollouts)), group_N, options.groups)
    parts = [rollouts[start : start + rollout.group] for start in range(0, len(rollouts), rollout.group)]
    chains = [measure_chains(part, Ranks()) for part in parts]
    return {
        "spread": spread_G.tolist(),
        "distinct": [own["distinct_chains"] for own in chains],
    }


def total(reward: WeightedSum, rollouts: Sequence[Rollout]) -> list[float]:
    """The weighted sum of each."""
    return reward.combine(list(score(reward, rollouts).unbind(1))).tolist()
