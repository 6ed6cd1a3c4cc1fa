"""What is measured: recipes of one iteration, and the CLIP that rewards it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from realign.libraries import import_open_clip
from realign.rewards.clip_models import find_mini
from train import clip
from train.policy import PolicyOptions
from train.prompts import DataOptions
from train.recipe import Guards, Recipe
from train.rollouts import RolloutOptions, WindowOptions
from train.update import UpdateOptions

LARGE_CLIP = "ViT-L-14"
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


def build_mini(clip_spec: str, variant: str, sizes: Sizes) -> Recipe:
    """mini: 8 in-context prompts, 12 samples of each, every one with an IC-CoT of its own (RID), 11
    timesteps, 2 steps with noise; all of the generation expert trained by one update.
    """
    rollout = RolloutOptions(8, 12, num_timesteps=11, max_tokens=160)
    if variant == "guided":
        rollout = replace(rollout, **GUIDED)
    return Recipe(
        "mini",
        f"clip:{clip_spec}",
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


def find_clip(folder: Path) -> tuple[str, str]:
    """The mini CLIP and what to call it: the one that is shipped, or one of its size without training."""
    if find_mini().is_dir():
        return "mini", "mini CLIP"
    recipe, model = clip.Recipe(), folder / "clip"
    model.mkdir()
    clip.save_tokenizer(model)
    (model / clip.CONFIG).write_text(json.dumps(clip.build_config(recipe)))
    save_weights(clip.build_model(recipe), model / clip.WEIGHTS)
    return str(model), "an untrained CLIP of its size"


def make_random_clip(name: str, folder: Path) -> str:
    """The spec of a CLIP of open_clip's with random weights."""
    torch.manual_seed(0)
    path = folder / f"{name}.safetensors"
    save_weights(import_open_clip().create_model(name, pretrained=None), path)
    return f"{name}:{path}"


def save_weights(model: torch.nn.Module, path: Path) -> None:
    """As open_clip reads them."""
    save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, path)
