"""Scenes: their splits, relations and drawing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from realign.world.render import render
from realign.world.scene import (
    BACKGROUNDS,
    COLOURS,
    NUM_CELLS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Object,
    Scene,
    holds,
    sample_scene,
)
from realign.world.tasks import TASKS, sample


def test_the_world_is_large_enough() -> None:
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 7
    assert len(SIZES) >= 2
    assert len(BACKGROUNDS) >= 6


def test_a_scene_does_not_depend_on_the_order_of_its_objects() -> None:
    star, ring = Object(4, "bar", "red", "small"), Object(0, "ring", "blue", "large")
    one, other = Scene("snow", (star, ring)), Scene("snow", (ring, star))
    assert one == other
    assert one.key == other.key
    assert one.split == other.split


def test_splits_are_a_function_of_the_scene_and_have_their_shares() -> None:
    rng = np.random.default_rng(0)
    shares = Counter(sample_scene(rng, 1 + i % 3).split for i in range(4000))
    assert abs(shares["train"] / 4000 - 0.8) < 0.03
    assert abs(shares["val"] / 4000 - 0.1) < 0.02


@pytest.mark.parametrize("task", TASKS)
def test_scenes_of_different_splits_never_meet(task: str) -> None:
    """Not only the targets: the pictures to edit are of the split too."""
    seen = {}
    for split in SPLITS:
        drawn = [sample(task, i, seed=i % 2, split=split) for i in range(150)]
        scenes = [d.target for d in drawn] + [d.instruction.source for d in drawn if d.instruction.source]
        assert all(scene.split == split for scene in scenes)
        seen[split] = {scene.key for scene in scenes}
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


def test_different_scenes_are_different_pictures() -> None:
    rng = np.random.default_rng(3)
    scenes = {s.key: s for s in (sample_scene(rng, 1 + i % 3) for i in range(300))}
    assert len({render(s).tobytes() for s in scenes.values()}) == len(scenes)


def test_relations_are_strict_and_opposite() -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for relation in RELATIONS:
        for cell in range(NUM_CELLS):
            assert not holds(relation, cell, cell)
            for other in range(NUM_CELLS):
                assert holds(relation, cell, other) == holds(opposite[relation], other, cell)
    assert holds("left of", 3, 8)
    assert holds("above", 1, 8)
    assert not holds("above", 3, 5)
