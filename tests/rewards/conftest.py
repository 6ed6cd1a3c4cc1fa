"""A small CLIP in open_clip's layout, untrained, and samples to score."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from realign.libraries import import_open_clip
from realign.rewards.base import Scored
from train.clip import CONFIG, WEIGHTS, Recipe, build_config, save_tokenizer

TINY = Recipe(
    vision={
        "image_size": 32,
        "patch_size": 16,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "pool_type": "avg",
    },
    text={"context_length": 12, "width": 32, "heads": 2, "layers": 1, "pool_type": "argmax"},
    embed_dim=16,
)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_tokenizer(folder)
    (folder / CONFIG).write_text(json.dumps(build_config(TINY)))
    torch.manual_seed(0)
    model = import_open_clip().CLIP(**build_config(TINY)["model_cfg"])
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # far apart embeddings: a wrong one is seen
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    return folder


def draw_picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_sample(seed: int = 0, **changes: object) -> Scored:
    return Scored(**{"name": f"s{seed}", "picture": draw_picture(seed), "prompt": "a red circle", **changes})


@pytest.fixture
def clean_modules() -> Iterator[None]:
    import sys

    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("own_rewards"):
            del sys.modules[name]
