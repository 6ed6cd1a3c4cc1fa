"""The mini CLIP inside the package: small, whole, and it sees what is wrong in a picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import realign
from realign.evals.ranking import RankingOptions, evaluate
from realign.rewards.clip import ClipEncoder, ClipReward
from realign.rewards.clip_models import find_mini
from realign.world.language import write_caption
from realign.world.render import render
from realign.world.scene import sample_scene
from realign.world.variants import ATTRIBUTES
from tests.rewards.conftest import make_sample


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return ClipEncoder("mini", "cpu")


def test_it_is_small():
    assert sum(path.stat().st_size for path in find_mini().iterdir()) < 8e6


@pytest.mark.parametrize("sort", ["rendered", "decoded"])
def test_it_ranks_the_true_picture_first(encoder, sort):
    """A loose bound for so few: three standard errors below .97 over all and .95 of each attribute."""
    options = RankingOptions(split="val", num=64, seed=9, sorts=(sort,))
    row = evaluate(encoder, realign.load("mini", device="cpu"), options)[sort]
    assert row["attributes"]["right"] > 0.97 - 3 * (0.97 * 0.03 / row["attributes"]["n"]) ** 0.5
    for kind in ATTRIBUTES:
        assert row[kind]["right"] > 0.95 - 3 * (0.95 * 0.05 / row[kind]["n"]) ** 0.5, kind


def test_a_picture_is_nearest_to_its_own_caption():
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng, 1 + number % 3) for number in range(32)]
    pictures = [Image.fromarray(render(scene)) for scene in scenes]
    captions = [write_caption(scene.objects, scene.background) for scene in scenes]
    reward = ClipReward("mini", "cpu")
    own = reward.score(
        [
            make_sample(i, picture=p, caption=c)
            for i, (p, c) in enumerate(zip(pictures, captions, strict=True))
        ]
    )
    other = reward.score([make_sample(i, picture=p, caption=captions[i - 1]) for i, p in enumerate(pictures)])
    assert (own > other).float().mean() == 1.0
    assert own.mean() - other.mean() > 0.3
