"""Trains mini's autoencoder on the world: FLUX's layout, small, from rendered pictures alone.

    python -m train.autoencoder --out runs/ae --minutes 15

Half the pictures are ordinary scenes, half are dense (up to nine objects: more edges a picture). Loss: L1 + 5
MSE + a little KL to N(0, I) (Kingma & Welling, 1312.6114). At the end the latents' mean and deviation over
ordinary scenes become `shift_factor` and `scale_factor`, as FLUX's are, so that the flow sees unit variance.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from realign.model.autoencoder import Autoencoder
from realign.model.config import AutoencoderConfig
from realign.runtime.prepare import to_picture, to_pixels
from realign.world.oracle import judge_caption, read_pictures
from realign.world.render import render, render_background_reference, render_object_reference
from realign.world.scene import BACKGROUNDS, Scene, sample_scene
from train.state import (
    append_row,
    drop_rows_after,
    load_optimizer_tensors,
    load_state,
    optimizer_tensors,
    save_state,
)

LOG, LOG_EVERY, CHECKPOINT_EVERY = "log.jsonl", 100, 500

MINI = AutoencoderConfig(
    resolution=64, in_channels=3, downsample=8, ch=32, out_ch=3, ch_mult=(1, 1, 2, 2), num_res_blocks=1,
    z_channels=16, scale_factor=1.0, shift_factor=0.0, norm_num_groups=8,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A run. Its learning rate decays by the clock, to end after `minutes`: a faster machine takes more
    steps, so the pictures and noise of a step are those of its seed, but the weights are not.
    """

    batch_size: int = 16
    references: int = 8
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    kl_weight: float = 1e-5
    mse_weight: float = 5.0
    grad_clip: float = 1.0
    seed: int = 0
    minutes: float = 15.0

    @property
    def budget(self) -> float:
        """Seconds of training."""
        return self.minutes * 60

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of a step, counted from 0, that begins after so many seconds of training."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        cosine = 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * seconds / self.budget))
        return float(self.learning_rate * warm * cosine)


def draw_pictures(recipe: Recipe, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The step's pictures. Returns: uint8 [B, 64, 64, 3] scenes and [R, 32, 32, 3] references."""
    rng = np.random.default_rng([recipe.seed, step])
    scenes = []
    while len(scenes) < recipe.batch_size:
        dense = len(scenes) % 2 == 0
        scene = sample_scene(rng, int(rng.integers(3, 10)) if dense else int(rng.integers(1, 4)))
        if dense or scene.split == "train":
            scenes.append(render(scene))
    return np.stack(scenes), np.stack([_draw_reference(rng) for _ in range(recipe.references)])


def _draw_reference(rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.25:
        return render_background_reference(BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
    return render_object_reference(sample_scene(rng, 1).objects[0])


def to_batch(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1], channels last in memory: faster convolutions."""
    pixels = torch.stack([to_pixels(picture) for picture in pictures])
    return pixels.contiguous(memory_format=torch.channels_last)


def to_pictures(pixels: torch.Tensor) -> np.ndarray:
    """The inverse of `to_batch`, clamped."""
    return np.stack([np.asarray(to_picture(picture)) for picture in pixels])


def loss_of(model: Autoencoder, pixels: torch.Tensor, noise: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Reconstruction from a posterior sample, and KL per latent number."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = model.encode_moments(pixels)
        mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
        sample = mean + (0.5 * logvar).exp() * noise
        decoded = model.decode(sample)
    error = decoded.float() - pixels
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    return (
        error.abs().mean()
        + recipe.mse_weight * (error**2).mean()
        + recipe.kl_weight * kl.sum((1, 2, 3)).mean()
    )


@torch.no_grad()
def evaluate(model: Autoencoder, num: int = 192, latent_noise: float = 0.0) -> dict[str, float]:
    """PSNR and the oracle's share of all-right reconstructions on validation scenes."""
    rng = np.random.default_rng(99)  # always the same scenes
    scenes: list[Scene] = []
    while len(scenes) < num:
        scene = sample_scene(rng, 1 + len(scenes) % 3)
        if scene.split == "val":
            scenes.append(scene)
    pictures = np.stack([render(s) for s in scenes])
    latent = model.encode(to_batch(pictures))
    generator = torch.Generator().manual_seed(0)
    latent = latent + latent_noise * latent.std() * torch.randn(latent.shape, generator=generator)
    decoded = to_pictures(model.decode(latent))
    mse = ((decoded.astype(float) - pictures) ** 2).mean()
    readings = read_pictures(decoded)
    right = np.mean([judge_caption(r, s).all_right for r, s in zip(readings, scenes, strict=True)])
    residual = np.mean([r.residual for r in readings])
    return {"psnr": 10 * np.log10(255**2 / mse), "all_right": float(right), "residual": float(residual)}


@torch.no_grad()
def latent_statistics(model: Autoencoder) -> tuple[float, float]:
    """Mean and standard deviation of the raw posterior means over ordinary scenes."""
    rng = np.random.default_rng(7)
    pictures = np.stack([render(sample_scene(rng, 1 + i % 3)) for i in range(256)])
    mean, _ = model.encode_moments(to_batch(pictures))
    return float(mean.mean()), float(mean.std())


class Trainer:
    """Model and optimiser; `seconds` is the training time so far, which the learning rate follows."""

    def __init__(self, recipe: Recipe, config: AutoencoderConfig) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.config = recipe, config
        self.model = Autoencoder(config).to(memory_format=torch.channels_last)
        self.names = {id(p): n for n, p in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.steps_done, self.seconds = 0, 0.0

    def step(self) -> dict[str, float]:
        """One optimiser step. Returns: what its log row says."""
        began = time.perf_counter()
        rate = self.recipe.rate(self.steps_done, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._accumulate_gradients()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self.seconds += time.perf_counter() - began
        return {"step": self.steps_done, "seconds": round(self.seconds), "loss": loss, "lr": rate}

    def _accumulate_gradients(self) -> float:
        """Of the step's scenes and references. Returns: the loss."""
        scenes, references = draw_pictures(self.recipe, self.steps_done)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.steps_done)
        loss = torch.zeros(())
        for pictures, weight in ((scenes, 0.85), (references, 0.15)):
            side = pictures.shape[1] // self.config.downsample
            noise = torch.randn(len(pictures), self.config.z_channels, side, side, generator=generator)
            part = weight * loss_of(self.model, to_batch(pictures), noise, self.recipe)
            part.backward()
            loss += part.detach()
        return float(loss)

    def save(self, out: Path) -> None:
        """Everything that the next step needs, atomically."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer, self.names)
        save_state(out, self.steps_done, tensors, {"seconds": self.seconds})

    def restore(self, out: Path) -> None:
        """Goes back to the newest whole checkpoint, if there is one."""
        state = load_state(out)
        if state is None:
            return
        tensors, numbers = state
        own = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(own)
        load_optimizer_tensors(self.optimizer, self.names, tensors)
        self.steps_done, self.seconds = numbers["step"], numbers["seconds"]


def run(recipe: Recipe, config: AutoencoderConfig, out: Path) -> None:
    """Trains for `minutes` of training time, with checkpoints; writes ae.safetensors and its config."""
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, config)
    trainer.restore(out)
    drop_rows_after(out / LOG, trainer.steps_done)
    while trainer.seconds < recipe.budget:
        row = trainer.step()
        if trainer.steps_done % CHECKPOINT_EVERY == 0:
            row |= evaluate(trainer.model)
            trainer.save(out)
        if trainer.steps_done % LOG_EVERY == 0:
            report(out, row)
    final = export(trainer.model, out)
    noisy = evaluate(trainer.model, latent_noise=0.15)
    report(out, {"final": evaluate(trainer.model), "noisy": noisy, "config": asdict(final)})


def export(model: Autoencoder, out: Path) -> AutoencoderConfig:
    """Writes the weights, and the config with the latents' own shift and scale, which it returns."""
    shift, deviation = latent_statistics(model)
    final = replace(model.config, shift_factor=round(shift, 4), scale_factor=round(1 / deviation, 4))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "ae.safetensors")
    (out / "ae_config.json").write_text(json.dumps(asdict(final), indent=1))
    return final


def report(out: Path, row: dict[str, Any]) -> None:
    """A row for the terminal and the log."""
    print(json.dumps(row), flush=True)
    append_row(out / LOG, row)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    args = parser.parse_args()
    run(Recipe(minutes=args.minutes, seed=args.seed), MINI, args.out)


if __name__ == "__main__":
    main()
