"""The comparison of two ways to draw: its numbers, on pictures and models where they are known."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import realign
from realign.evals.quality import BEST_PSNR, compare, psnr, without_caching
from realign.model.bagel import Bagel
from realign.model.fp8 import Fp8Scales, recording_inputs, use_fp8
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.request import Prompt, Request
from realign.runtime.settings import CachingSettings, GuidanceSettings, Settings, TextSettings
from realign.world.tasks import sample
from tests.runtime.conftest import CHECKPOINT

CACHED = Settings(
    16, 24, "ic-cot", 12, text=TextSettings(6), caching=CachingSettings(interval=3, order=1, first=3)
)
MINI = Settings(64, 64, num_timesteps=12)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(Bagel.from_pretrained(CHECKPOINT), PROGRAMS)


def build_requests(settings: Settings, count: int = 3) -> list[Request]:
    return [Request(str(number), Prompt.build(f"lamp {number}"), 5, settings) for number in range(count)]


def test_psnr():
    black, other = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (0, 0, 51))
    assert psnr(black, black) == BEST_PSNR
    assert psnr(black, other) == pytest.approx(10 * np.log10(3 * 25))
    assert psnr(black, Image.new("RGB", (4, 4), (255, 255, 255))) == pytest.approx(0)


def test_the_same_way_twice_is_equal(engine):
    result = compare(engine, engine, build_requests(replace(CACHED, caching=CachingSettings())), batch_size=2)
    assert result["psnr"] == {"mean": BEST_PSNR, "worst": BEST_PSNR, "worst_id": "0"}
    assert result["latent_error"] == {"mean": 0.0, "worst": 0.0}
    assert result["velocity_error"]["by_step"] == [0.0] * 11
    assert result["other_texts"] == 0
    assert set(result["seconds"]) == {"plain", "fast"}


def test_only_steps_that_are_forecast_have_an_error(engine):
    """From the plain run's own latents a computed step is the plain one, whatever was forecast before."""
    result = compare(engine, engine, build_requests(CACHED), batch_size=2)
    computed = [0, 1, 2, 5, 8, 10]
    by_step = result["velocity_error"]["by_step"]
    assert [step for step, error in enumerate(by_step) if error < 1e-5] == computed
    assert 0 < result["latent_error"]["mean"] < 0.5
    assert result["psnr"]["worst"] <= result["psnr"]["mean"] < BEST_PSNR
    assert len(result["by_picture"]) == result["pictures"] == 3
    assert result["by_picture"][0]["id"] == "0"


def test_the_error_of_a_velocity_is_what_it_says(engine):
    """A model whose velocities are a tenth too long, without guidance: the error of every step is .1."""
    longer = copy.deepcopy(engine.model)
    with torch.no_grad():
        longer.llm2vae.weight.mul_(1.1)
        longer.llm2vae.bias.mul_(1.1)
    settings = Settings(16, 16, num_timesteps=6, guidance=GuidanceSettings(1.0))
    result = compare(engine, Engine(longer, PROGRAMS), build_requests(settings))
    assert result["velocity_error"]["by_step"] == pytest.approx([0.1] * 5, rel=1e-3)


def test_a_scorer_sees_both_ways_with_the_prompt(engine):
    seen = []

    def score(images, texts):
        seen.append((len(images), list(texts)))
        return [float(len(seen))] * len(images)

    result = compare(engine, engine, build_requests(CACHED, 2), score=score)
    assert seen == [(2, ["lamp 0", "lamp 1"])] * 2
    assert result["score"] == {"plain": 1.0, "fast": 2.0}


def test_the_plain_way_computes_every_step():
    request = without_caching(build_requests(CACHED)[0])
    assert request.settings == replace(CACHED, caching=CachingSettings())


@pytest.fixture(scope="module")
def mini_prompts():
    return [
        Request(f"{number}", Prompt.build(sample("t2i", number, split="val").text), 0, MINI)
        for number in range(4)
    ]


def test_fp8_pictures_of_mini_are_near(mini_prompts):
    """30 dB, the bound, is a mean error of eight levels of 255."""
    plain, other = (realign.load("mini", device="cpu") for _ in range(2))
    with recording_inputs(plain.model) as find_scales:
        plain.engine.run(mini_prompts)
        use_fp8(other.model, Fp8Scales("", find_scales()))
    result = compare(plain.engine, other.engine, mini_prompts)
    assert 30 < result["psnr"]["worst"] < BEST_PSNR
    assert 1e-3 < result["velocity_error"]["mean"] < 0.2


def test_step_caching_of_mini_is_near(mini_prompts):
    """Measured: 63 dB in the mean of 16 pictures."""
    engine = realign.load("mini", device="cpu").engine
    settings = replace(MINI, num_timesteps=50, caching=CachingSettings(interval=3))
    result = compare(engine, engine, [replace(request, settings=settings) for request in mini_prompts])
    assert result["psnr"]["mean"] > 45
