"""The autoencoder's trainer: it learns, goes on where it stopped, and writes what a model begins from."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from realign.model.bagel import Bagel
from realign.model.config import AutoencoderConfig
from train import autoencoder
from train.autoencoder import Recipe, Trainer, run, to_batch, to_pictures
from train.init_model import init_model

CONFIG = AutoencoderConfig(
    resolution=64, downsample=8, ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4,
    scale_factor=1.0, shift_factor=0.0, norm_num_groups=2,
)  # fmt: skip
# By a clock of one second a step, 12 steps.
RECIPE = Recipe(batch_size=2, references=1, warmup_steps=2, minutes=12 / 60)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second between two looks at it; a row each step, a checkpoint every fourth; no evaluation."""
    seconds = count()
    monkeypatch.setattr(autoencoder.time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(autoencoder, "LOG_EVERY", 1)
    monkeypatch.setattr(autoencoder, "CHECKPOINT_EVERY", 4)
    monkeypatch.setattr(autoencoder, "evaluate", lambda model, latent_noise=0.0: {"psnr": latent_noise})


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_pixels_round_trip() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    pixels = to_batch(pictures)
    assert pixels.shape == (3, 3, 4, 5)
    assert (pixels.min() >= -1, pixels.max() <= 1) == (True, True)
    # The way back cuts to 8 bits, so that a level may come out one too low.
    assert np.isin(pictures.astype(int) - to_pictures(pixels), (0, 1)).all()


def test_the_loss_falls_to_the_end_of_its_time(tmp_path: Path) -> None:
    run(RECIPE, CONFIG, tmp_path)
    *rows, final = read_log(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[1]["lr"] > 10 * rows[-1]["lr"]
    assert final["noisy"] == {"psnr": 0.15}


def test_a_stopped_run_goes_on_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(RECIPE, CONFIG, tmp_path / "whole")
    step = Trainer.step

    def stop_at_seven(trainer: Trainer) -> dict[str, float]:
        if trainer.steps_done == 6:
            raise KeyboardInterrupt
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", stop_at_seven)
    with pytest.raises(KeyboardInterrupt):
        run(RECIPE, CONFIG, tmp_path / "stopped")
    monkeypatch.setattr(Trainer, "step", step)
    assert len(read_log(tmp_path / "stopped")) == 6
    run(RECIPE, CONFIG, tmp_path / "stopped")
    whole, stopped = (load_file(tmp_path / name / "ae.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert read_log(tmp_path / "whole") == read_log(tmp_path / "stopped")


def test_a_model_begins_from_what_it_writes(tmp_path: Path) -> None:
    run(replace(RECIPE, minutes=1 / 60), CONFIG, tmp_path / "ae")
    torch.manual_seed(5)
    init_model(tmp_path / "ae", tmp_path / "start", seed=0)
    model = Bagel.from_pretrained(tmp_path / "start")
    trained = load_file(tmp_path / "ae" / "ae.safetensors")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.autoencoder.state_dict().items())
    latent = model.autoencoder.encode(to_batch(autoencoder.draw_pictures(Recipe(batch_size=64), 99)[0]))
    assert latent.mean().abs() < 0.3, "shift_factor is that of the latents"
    assert 0.6 < latent.std() < 1.6, "scale_factor too"
