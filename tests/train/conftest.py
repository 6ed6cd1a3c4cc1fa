"""A tiny untrained checkpoint and a recipe for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from realign.model.bagel import Bagel
from realign.model.config import AutoencoderConfig, BagelConfig, LLMConfig, ResizeRule, ViTConfig
from realign.model.tokenizer import Tokenizer
from train.tokenizer import train_tokenizer

RECIPE = """
start = "{start}"
precision = "{precision}"
seed = 3
checkpoint_every = 2
log_every = 1

[optimization]
steps = {steps}
learning_rate = 3e-3
warmup_steps = 2

[mixture]
num_scenes = 24
text_dropout = 0.2
image_dropout = 0.2
timestep_shift = 1.0

[mixture.counts]
"t2i/none" = 1
"t2i/ic-cot" = 1
"in_context/none" = 1
"in_context/ic-cot" = 2
"edit/none" = 1
"edit/ic-cot" = 2
"""


@pytest.fixture(scope="session")
def start_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    train_tokenizer(folder, num=60)
    tokenizer = Tokenizer.load(folder)
    config = BagelConfig(
        llm=LLMConfig(len(tokenizer), 32, 64, 2, 4, 2, initializer_range=0.1),
        vit=ViTConfig(24, 32, 1, 2, patch_size=16, image_size=64),
        autoencoder=AutoencoderConfig(
            resolution=64, downsample=8, ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4,
            norm_num_groups=2,
        ),
        max_latent_size=4,
        vit_max_num_patch_per_side=4,
        vae_resize=ResizeRule(64, 32, 16),
        vit_resize=ResizeRule(64, 32, 16),
        default_image_size=(64, 64),
        size_follows_picture=False,
        reasoning_modes=("none", "ic-cot"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Bagel(config)
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def write_recipe(tmp_path: Path, start_folder: Path):
    def write(steps: int = 6, precision: str = "float32", name: str = "recipe.toml") -> Path:
        path = tmp_path / name
        path.write_text(RECIPE.format(start=start_folder, steps=steps, precision=precision))
        return path

    return write
