"""What is measured: recipes of one iteration, and the CLIP that rewards it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from realign.libraries import import_open_clip
from train.policy import PolicyOptions
from train.prompts import DataOptions
from train.recipe import Guards, Recipe
from train.rollouts import RolloutOptions, WindowOptions
from train.update import UpdateOptions

MINI_CLIP, LARGE_CLIP = "mini", "ViT-L-14"
SCORED = {"cuda": (512, 16, 1024), "cpu": (4, 2, 1024)}  # pictures, those of the baseline, pixels a side
PROMPT = "a small brass telescope on a wooden table by a window, at dusk"  # BAGEL-7B's
VARIANTS = ("unguided", "guided")
GUIDED = {"text_scale": 4.0, "interval": (0.4, 1.0)}  # `realign generate`'s


@dataclass(frozen=True)
class Sizes:
    """Prompts of an iteration, samples of each; None: the workload's own."""

    prompts: int | None = None
    group: int | None = None

    def fit(self, rollout: RolloutOptions) -> RolloutOptions:
        """The rollouts with these sizes."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(rollout, **given)


def build_mini(variant: str, sizes: Sizes) -> Recipe:
    """mini: 8 in-context prompts, 12 samples of each, every one with an IC-CoT of its own (RID), 11
    timesteps, 2 steps with noise; all of the generation expert trained by one update.
    """
    rollout = RolloutOptions(8, 12, num_timesteps=11, max_tokens=160)
    if variant == "guided":
        rollout = replace(rollout, **GUIDED)
    return Recipe(
        "mini",
        f"clip:{MINI_CLIP}",
        1,
        DataOptions(tasks=("in_context",)),
        sizes.fit(rollout),
        WindowOptions(end=5),
        update=UpdateOptions(clip_low=1e-3, clip_high=1e-3),
    )


def build_large(clip_spec: str, prompts: Path, sizes: Sizes) -> Recipe:
    """BAGEL-7B's: one prompt without references, 24 samples of 512x512, 15 timesteps, 2 of them with noise,
    text guidance 4 on every step, LoRA.

    Random weights write no IC-CoT that can be read; so chains are free text, of 256 tokens. What their
    numbers are worth is nothing, so that no guard may stop them.
    """
    rollout = RolloutOptions(
        1, 24, "think", height=512, width=512, num_timesteps=15, text_scale=4.0, interval=(0.0, 1.0)
    )
    return Recipe(
        "bagel-7b",
        f"clip:{clip_spec}",
        1_000,
        DataOptions(prompts=str(prompts)),
        sizes.fit(rollout),
        WindowOptions(end=7),
        PolicyOptions("lora", checkpointing=True),
        UpdateOptions(learning_rate=1e-4, clip_low=1e-5, clip_high=1e-5),
        guards=Guards(ratio=1e9, spread=0.0),
        dtype="bfloat16",
    )


def make_random_clip(name: str, folder: Path) -> str:
    """The spec of a CLIP of open_clip's with random weights."""
    torch.manual_seed(0)
    path = folder / f"{name}.safetensors"
    model = import_open_clip().create_model(name, pretrained=None)
    tensors = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, path)
    return f"{name}:{path}"
