"""Ranking pictures by captions: the trials, and what is counted as right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import realign
from realign.api import Generator
from realign.evals.ranking import RankingOptions, draw_trials, evaluate, format_table, make_pictures
from realign.world.language import read_caption
from realign.world.oracle import judge_caption, read_pictures
from realign.world.scene import Scene
from realign.world.variants import ATTRIBUTES, KINDS


class OracleEncoder:
    """Embeds what the oracle reads, and what a caption says, exactly; blind to one attribute if asked."""

    def __init__(self, blind_to: str | None = None) -> None:
        self._blind_to = blind_to

    def encode_pictures(self, pictures):
        readings = read_pictures([np.asarray(picture) for picture in pictures])
        return torch.stack([self._embed(reading.scene) for reading in readings])

    def encode_texts(self, texts):
        return torch.stack([self._embed(read_caption(text)) for text in texts])

    def _embed(self, scene: Scene) -> torch.Tensor:
        facts = [scene.background]
        for thing in scene.objects:
            facts += [f"{thing.cell} {name} {getattr(thing, name)}" for name in ("shape", "colour", "size")]
        vector = torch.zeros(4096)
        for fact in facts:
            if not self._blind_to or f" {self._blind_to} " not in fact:
                vector[int.from_bytes(fact.encode(), "big") % 4093] += 1
        return vector


@pytest.fixture(scope="module")
def generator() -> Generator:
    return realign.load("mini", device="cpu")


def test_trials():
    trials = draw_trials(RankingOptions(num=60, seed=3))
    assert {trial.kind for trial in trials} == set(KINDS)
    for trial in trials:
        assert trial.scene.split == "test"
        assert read_caption(trial.caption) == trial.scene != trial.variant
    assert draw_trials(RankingOptions(num=60, seed=3)) == trials
    assert draw_trials(RankingOptions(num=60, seed=4)) != trials


def test_one_that_sees_all_is_always_right_and_a_blind_one_is_found_out(generator):
    options = RankingOptions(num=24, sorts=("rendered",))
    row = evaluate(OracleEncoder(), generator, options)["rendered"]
    assert all(row[kind]["right"] == 1.0 for kind in KINDS)
    assert row["attributes"]["n"] == sum(row[kind]["n"] for kind in ATTRIBUTES)
    blind = evaluate(OracleEncoder("size"), generator, options)["rendered"]
    assert blind["size"]["right"] == 0.0, "a draw is not right"
    assert blind["shape"]["right"] == blind["colour"]["right"] == 1.0


def test_the_table(generator):
    result = evaluate(OracleEncoder(), generator, RankingOptions(num=3, sorts=("decoded",)))
    table = format_table(result).splitlines()
    assert table[0].split() == ["wrong", "in", "decoded"]
    assert [line.split()[0] for line in table[1:]] == ["attributes", *KINDS]


def test_no_trials_have_no_share(generator):
    row = evaluate(OracleEncoder(), generator, RankingOptions(num=1, sorts=("rendered",)))["rendered"]
    assert row["swap"] == {"right": None, "se": None, "n": 0}, "one object has nothing to swap with"


def test_generated_pictures_show_their_scenes(generator):
    scenes = [trial.scene for trial in draw_trials(RankingOptions(num=8))]
    scenes = list({scene.key: scene for scene in scenes}.values())
    made = make_pictures("generated", scenes, generator, RankingOptions(steps=8))
    assert 0 < len(made) <= len(scenes)
    by_key = {scene.key: scene for scene in scenes}
    readings = read_pictures(list(made.values()))
    assert all(judge_caption(r, by_key[key]).all_right for key, r in zip(made, readings, strict=True))
