"""The golden fixture, and small models made from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from realign.model.bagel import Bagel
from realign.model.config import AutoencoderConfig, BagelConfig
from realign.model.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "fixtures" / "bagel-tiny"


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return GOLDEN / "checkpoint"


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="session")
def golden_json() -> dict[str, Any]:
    return json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="session")
def golden_model(checkpoint: Path) -> Bagel:
    """The golden checkpoint in float32; tests leave its weights alone."""
    return Bagel.from_pretrained(checkpoint)


@pytest.fixture
def small_config(checkpoint: Path) -> BagelConfig:
    """The golden sizes with a still smaller autoencoder, unlike BAGEL's in whatever the layout allows."""
    autoencoder = AutoencoderConfig(
        downsample=2, ch=8, ch_mult=(2, 3), num_res_blocks=1, z_channels=3, norm_num_groups=4
    )
    return replace(BagelConfig.load(checkpoint), autoencoder=autoencoder)


@pytest.fixture
def small_model(small_config: BagelConfig, checkpoint: Path) -> Bagel:
    """Freshly initialised, with the golden tokenizer."""
    torch.manual_seed(0)
    model = Bagel(small_config)
    model.tokenizer = Tokenizer.load(checkpoint)
    return model
