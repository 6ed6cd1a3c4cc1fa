"""Trains the mini CLIP on the world: open_clip's own model class, small, so that open_clip alone can load it.

    python -m train.clip train/recipes/clip-mini.toml --out runs/clip

A group is a scene and variants of it with a single thing wrong, so that nearly all of the loss is between
pictures that differ in one attribute, as the pictures of a GRPO group do. The loss is CLIP's (arXiv
2103.00020), both ways: every caption against all pictures of the batch, every picture that has a caption
against all captions; pictures of equal scenes are not each other's negatives. A part of the pictures has gone
through mini's autoencoder, with noise on the latents: what generated pictures look like. Captions are those
of IC-CoT, their objects in any order.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from realign.libraries import import_open_clip
from realign.model.autoencoder import Autoencoder
from realign.model.bagel import Bagel
from realign.world.language import write_caption
from realign.world.render import render
from realign.world.scene import (
    BACKGROUNDS,
    COLOURS,
    MAX_OBJECTS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    sample_scene,
)
from realign.world.variants import draw_variant
from realign_kernels import clip_preprocess
from train.state import (
    append_row,
    drop_rows_after,
    load_optimizer_tensors,
    load_state,
    optimizer_tensors,
    save_state,
)

LOG, LOG_EVERY, CHECKPOINT_EVERY = "log.jsonl", 50, 250
PAD, UNKNOWN, START, END = "<pad>", "<unknown>", "<start>", "<end>"
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Recipe:
    """A run. Its learning rate decays by the seconds of processor time it has had, and ends after `minutes`.

    Attributes:
        groups: scenes of a batch, each with `variants` pictures (itself the first).
        captions: so many pictures of a group have a caption.
        kinds: how often each kind of variant is drawn, relative to the others.
        decoded: share of the groups that were through the autoencoder.
        latent_noise: the largest deviation of the noise on their latents, which have unit variance.
        pool: decoded groups that are kept; `fresh` of them are new in each step.
        place_scale: what open_clip's initial positions of the picture's patches are multiplied by. As they
            are, and with a mean over patches, an object's place hardly moves a picture's embedding, and
            places were still at chance when shapes were learned.
    """

    groups: int = 16
    variants: int = 8
    captions: int = 4
    kinds: Mapping[str, float] = field(
        default_factory=lambda: {
            "shape": 3.0, "size": 2.0, "place": 3.0, "colour": 1.5,
            "background": 0.5, "missing": 0.7, "extra": 0.7, "swap": 1.0,
        }
    )  # fmt: skip
    decoded: float = 0.5
    latent_noise: float = 0.4
    pool: int = 512
    fresh: int = 1
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    max_logit_scale: float = 50.0
    seed: int = 0
    minutes: float = 20.0
    vision: Mapping[str, Any] = field(
        default_factory=lambda: {
            "image_size": 63, "patch_size": 21, "layers": 3, "width": 160, "head_width": 32,
            "pool_type": "tok",
        }
    )  # fmt: skip
    text: Mapping[str, Any] = field(
        default_factory=lambda: {
            "context_length": 40, "width": 128, "heads": 4, "layers": 3, "mlp_ratio": 2.0,
            "pool_type": "argmax",
        }
    )  # fmt: skip
    embed_dim: int = 256
    place_scale: float = 16.0

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of a step that begins after so many seconds: warm-up, then a cosine to 1%."""
        share = min(seconds / (60 * self.minutes), 1.0)
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass(frozen=True)
class Group:
    """A scene, and its variants; the first `captions` scenes have captions.

    Attributes:
        scenes: the first is what the others are variants of.
        pictures_NHWC: uint8 [variants, 64, 64, 3].
    """

    scenes: tuple[Scene, ...]
    pictures_NHWC: np.ndarray


def draw_scenes(rng: np.random.Generator, recipe: Recipe) -> tuple[Scene, ...]:
    """A training scene and its variants; no more objects than a caption names where they are to have one."""
    while (anchor := sample_scene(rng, int(rng.integers(1, MAX_OBJECTS + 1)))).split != "train":
        pass
    kinds, weights = list(recipe.kinds), np.array(list(recipe.kinds.values()))
    scenes = [anchor]
    while len(scenes) < recipe.variants:
        variant = draw_variant(rng, anchor, str(rng.choice(kinds, p=weights / weights.sum())))
        fits = variant is not None and (len(variant.objects) <= MAX_OBJECTS or len(scenes) >= recipe.captions)
        if fits:
            scenes.append(variant)
    return tuple(scenes)


def draw_caption(rng: np.random.Generator, scene: Scene) -> str:
    """A scene's caption, its objects in any order."""
    return write_caption([scene.objects[i] for i in rng.permutation(len(scene.objects))], scene.background)


class Pictures:
    """Draws groups: rendered, or out of a pool of decoded ones that is renewed bit by bit."""

    def __init__(self, recipe: Recipe, autoencoder: Autoencoder) -> None:
        self._recipe, self._autoencoder = recipe, autoencoder
        self._pool: list[Group] = []

    def draw(self, rng: np.random.Generator) -> list[Group]:
        """The groups of a step."""
        recipe = self._recipe
        while len(self._pool) < min(2 * recipe.groups, recipe.pool):
            self._pool.append(self._decode(rng))
        for _ in range(recipe.fresh):
            self._pool.append(self._decode(rng))
        del self._pool[: max(0, len(self._pool) - recipe.pool)]
        num_decoded = round(recipe.decoded * recipe.groups)
        chosen = [self._pool[i] for i in rng.choice(len(self._pool), num_decoded, replace=False)]
        return chosen + [self._render(rng) for _ in range(recipe.groups - num_decoded)]

    def _render(self, rng: np.random.Generator) -> Group:
        scenes = draw_scenes(rng, self._recipe)
        return Group(scenes, np.stack([render(scene) for scene in scenes]))

    def _decode(self, rng: np.random.Generator) -> Group:
        group = self._render(rng)
        noise = self._recipe.latent_noise * float(rng.random())
        return Group(group.scenes, through_autoencoder(self._autoencoder, group.pictures_NHWC, noise, rng))


@torch.no_grad()
def through_autoencoder(
    autoencoder: Autoencoder, pictures_NHWC: np.ndarray, noise: float, rng: np.random.Generator
) -> np.ndarray:
    """Encode, add noise of a deviation, decode. uint8 [N, 64, 64, 3] to the same."""
    pixels = torch.from_numpy(pictures_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.autocast("cpu", torch.bfloat16):
        latent = autoencoder.encode(pixels.contiguous(memory_format=torch.channels_last)).float()
        random = torch.from_numpy(rng.standard_normal(tuple(latent.shape), dtype=np.float32))
        decoded = autoencoder.decode(latent + noise * random).float()
    return ((decoded * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def list_words() -> list[str]:
    """Every word of the world's captions, and the comma."""
    named = " ".join((*SIZES, *COLOURS, *SHAPES, *PLACES, *BACKGROUNDS))
    return [",", *sorted({*named.split(), "a", "an", "at", "the", "on", "and", "in", "background"})]


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, as transformers and so open_clip load it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [PAD, UNKNOWN, *list_words(), START, END]  # open_clip pools where the id is largest: at END
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(START, names.index(START)), (END, names.index(END))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{START} $A {END}", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, bos_token=START, eos_token=END,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip


def build_config(recipe: Recipe) -> dict[str, Any]:
    """The content of `open_clip_config.json`."""
    text = {
        **recipe.text,
        "vocab_size": len(list_words()) + 4,
        "hf_tokenizer_name": "words",  # open_clip then takes the tokenizer in the same folder
        "tokenizer_kwargs": {"clean": "whitespace"},
    }
    return {
        "model_cfg": {"embed_dim": recipe.embed_dim, "vision_cfg": dict(recipe.vision), "text_cfg": text},
        "preprocess_cfg": {
            "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest",
        },
    }  # fmt: skip


def build_model(recipe: Recipe) -> nn.Module:
    """An untrained model."""
    torch.manual_seed(recipe.seed)
    model = import_open_clip().CLIP(**build_config(recipe)["model_cfg"])
    with torch.no_grad():
        model.visual.positional_embedding.mul_(recipe.place_scale)
    return model


def contrast(
    picture_ND: Tensor, caption_MD: Tensor, own_M: Tensor, is_equal_MN: Tensor, logit_scale: Tensor
) -> Tensor:
    """CLIP's loss, where picture `own_M[m]` belongs to caption m and equal scenes do not count as wrong.

    Args:
        picture_ND, caption_MD: embeddings.
        own_M: int64, the number of each caption's picture.
        is_equal_MN: bool, whether caption m also says what picture n shows.
    """
    logits_MN = logit_scale * normalize(caption_MD.float(), dim=-1) @ normalize(picture_ND.float(), dim=-1).T
    rows = torch.arange(len(own_M))
    is_other = is_equal_MN.clone()
    is_other[rows, own_M] = False
    logits_MN = logits_MN.masked_fill(is_other, -math.inf)
    return 0.5 * (cross_entropy(logits_MN, own_M) + cross_entropy(logits_MN[:, own_M].T, rows))


class Trainer:
    """Model, optimiser and tokenizer of a run."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.model = build_model(recipe)
        self.pictures = Pictures(recipe, Bagel.from_pretrained("mini", "cpu", torch.float32).autoencoder)
        self.names = {id(p): name for name, p in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self._parameters(), betas=(0.9, 0.98), eps=1e-6)
        model_folder = folder / "model"
        model_folder.mkdir(parents=True, exist_ok=True)
        save_tokenizer(model_folder)
        (model_folder / CONFIG).write_text(json.dumps(build_config(recipe), indent=1) + "\n")
        self.tokenize = import_open_clip().get_tokenizer(f"local-dir:{model_folder}")

    def _parameters(self) -> list[dict[str, Any]]:
        decay = [p for p in self.model.parameters() if p.dim() >= 2]
        rest = [p for p in self.model.parameters() if p.dim() < 2]
        return [
            {"params": decay, "weight_decay": self.recipe.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]

    def step(self, number: int, seconds: float) -> float:
        """One step; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(number, seconds)
        loss = self.loss(np.random.default_rng([self.recipe.seed, number]))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(self.recipe.max_logit_scale))
        return float(loss.detach())

    def loss(self, rng: np.random.Generator) -> Tensor:
        """The loss of one batch."""
        recipe = self.recipe
        groups = self.pictures.draw(rng)
        keys = [scene.key for group in groups for scene in group.scenes]
        own = [g * recipe.variants + c for g in range(len(groups)) for c in range(recipe.captions)]
        captions = [draw_caption(rng, groups[i // recipe.variants].scenes[i % recipe.variants]) for i in own]
        pixels = torch.from_numpy(np.concatenate([group.pictures_NHWC for group in groups]))
        is_equal = torch.tensor([[keys[m] == key for key in keys] for m in own])
        with torch.autocast("cpu", torch.bfloat16):
            picture_ND = self.model.encode_image(preprocess(pixels, recipe))
            caption_MD = self.model.encode_text(self.tokenize(captions))
        return contrast(picture_ND, caption_MD, torch.tensor(own), is_equal, self.model.logit_scale.exp())

    def save_model(self) -> None:
        """The folder that open_clip loads."""
        tensors = {name: value.detach().contiguous() for name, value in self.model.state_dict().items()}
        temporary = self.folder / "model" / f".{WEIGHTS}"
        save_file(tensors, temporary)
        temporary.replace(self.folder / "model" / WEIGHTS)

    def save(self, step: int, seconds: float) -> None:
        """A checkpoint; the pool of decoded pictures is not kept, a new one is drawn."""
        tensors = dict(self.model.named_parameters()) | optimizer_tensors(self.optimizer, self.names)
        save_state(self.folder / "checkpoints", step, tensors, {"seconds": seconds})
        self.save_model()

    def resume(self) -> tuple[int, float]:
        """From the last checkpoint: the step to go on with, and the seconds that were spent."""
        found = load_state(self.folder / "checkpoints")
        if found is None:
            return 0, 0.0
        tensors, numbers = found
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[name])
        load_optimizer_tensors(self.optimizer, self.names, tensors)
        return numbers["step"], numbers["seconds"]


def preprocess(pixels_NHWC: Tensor, recipe: Recipe) -> Tensor:
    """uint8 [N, 64, 64, 3] to the model's input."""
    return clip_preprocess(pixels_NHWC, recipe.vision["image_size"], mean=MEAN, std=STD)


def train(recipe: Recipe, folder: Path) -> None:
    """Runs a recipe to its end, from its last checkpoint if there is one."""
    trainer = Trainer(recipe, folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    step, before = trainer.resume()
    drop_rows_after(folder / LOG, step)
    began, losses = time.process_time(), []
    while (seconds := before + time.process_time() - began) < 60 * recipe.minutes:
        losses.append(trainer.step(step, seconds))
        step += 1
        if step % LOG_EVERY == 0:
            row = {"step": step, "seconds": round(seconds, 1), "loss": round(float(np.mean(losses)), 4)}
            append_row(folder / LOG, row)
            print(json.dumps(row), flush=True)
            losses.clear()
        if step % CHECKPOINT_EVERY == 0:
            trainer.save(step, seconds)
    trainer.save(step, seconds)


def load_recipe(path: Path) -> Recipe:
    """A recipe from TOML; unknown names are refused."""
    values = tomllib.loads(path.read_text())
    unknown = sorted(values.keys() - {f.name for f in fields(Recipe)})
    if unknown:
        raise ValueError(f"{path}: unknown {unknown[0]!r}")
    return Recipe(**values)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    train(load_recipe(args.recipe), args.out)


if __name__ == "__main__":
    main()
