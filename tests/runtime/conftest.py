"""The tiny checkpoint of the golden fixture, NaN in fresh memory, and requests that differ in everything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.prepare import crop_picture
from realign.runtime.request import Prompt, Request
from realign.runtime.settings import CachingSettings, GuidanceSettings, Settings, TextSettings

CHECKPOINT = Path(__file__).parents[1] / "fixtures" / "bagel-tiny" / "checkpoint"


@pytest.fixture(scope="session")
def model() -> Bagel:
    return Bagel.from_pretrained(CHECKPOINT)


@pytest.fixture
def engine(model: Bagel) -> Engine:
    return Engine(model, PROGRAMS, prepare=crop_picture)


@pytest.fixture
def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: what is read before it is written cannot look right."""
    empty = torch.empty

    def make_poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", make_poisoned)


def draw_picture(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def mixed_requests() -> list[Request]:
    """Prompts, numbers of references, sizes, schedules, guidance, reasoning and sampling all differ."""
    first, second = draw_picture(0, 48, 32), draw_picture(1, 32, 64)
    sampled, narrow = TextSettings(12, temperature=1.0), TextSettings(9, temperature=0.8, top_p=0.9)
    plain = GuidanceSettings()
    rows = [
        (["a mug"], Settings(16, 40, num_timesteps=5, guidance=plain)),
        ([first, "put it on the table"], Settings(32, 32, "think", 6, guidance=plain, text=sampled)),
        (
            [first, second, "put the mug of image 1 next to the lamp"],
            Settings(
                48, 16, "ic-cot", 4, 1.0, GuidanceSettings(3.0, 1.5, (0.0, 1.0), "channel", 0.5), narrow
            ),
        ),
        (
            ["look at this", second, "and this", first, "and draw both"],
            Settings(16, 16, "none", 8, 4.0, GuidanceSettings(5.0, 1.7, (0.2, 0.9), "text_channel", 0.1)),
        ),
        (
            [second, "a lamp on a mug"],
            Settings(24, 16, num_timesteps=9, caching=CachingSettings(2, 1, 2, reuse_guidance_below=0.7)),
        ),
        ([second, "a lamp"], Settings(16, 24, "ic-cot", 3, guidance=GuidanceSettings(1.0, 2.0))),
        (
            ["a lamp"],
            Settings(16, 16, "think", 2, guidance=GuidanceSettings(2.0, renorm="none"), text=sampled),
        ),
        ([first, "a mug"], Settings(24, 16, "none", 5, guidance=GuidanceSettings(4.0, 1.0))),
    ]
    return [
        Request(f"request {number}", Prompt.build(parts), seed=number, settings=settings)
        for number, (parts, settings) in enumerate(rows)
    ]
