"""Trains the mini CLIP on the world: open_clip's own model class, small, so that open_clip alone can load it.

    python -m train.clip train/recipes/clip-mini.toml --out runs/clip

Nearly all of the loss is between pictures that differ in one attribute, as the pictures of a GRPO group do
(`train.clip_pictures`). The loss is CLIP's (arXiv 2103.00020), both ways: every caption against all pictures
of the batch, every picture that has a caption against all captions; pictures of equal scenes are not each
other's negatives. Beside it, one linear reader, thrown away afterwards, has to find in the embeddings of both
towers what stands in each place: by contrast alone the towers learn bags of objects first, and places late.
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
from realign.model.bagel import Bagel
from realign.world.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene
from realign_kernels import clip_preprocess
from train.clip_pictures import PictureOptions, Pictures, draw_caption
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
        reading: weight of the reader's loss beside that of contrast.
        vision, text: of open_clip's `CLIP`.
        place_scale: what the initial positions of the picture tower's attention pool are multiplied by: as
            they come, all its heads begin by looking everywhere alike.
    """

    pictures: PictureOptions = field(default_factory=PictureOptions)
    reading: float = 1.0
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    max_logit_scale: float = 50.0
    seed: int = 0
    minutes: float = 15.0
    vision: Mapping[str, Any] = field(
        default_factory=lambda: {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64}
    )
    text: Mapping[str, Any] = field(
        default_factory=lambda: {
            "context_length": 40, "width": 128, "heads": 4, "layers": 3, "mlp_ratio": 2.0,
            "pool_type": "argmax",
        }
    )  # fmt: skip
    embed_dim: int = 256
    place_scale: float = 4.0

    def rate(self, step: int, seconds: float) -> float:
        """The learning rate of a step that begins after so many seconds: warm-up, then a cosine to 1%."""
        share = min(seconds / (60 * self.minutes), 1.0)
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


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
        model.visual.attnpool.positional_embedding.mul_(recipe.place_scale)
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


def list_contents(scene: Scene) -> list[int]:
    """What a reader has to say of a scene: background; of each place shape, colour, size (0 for none)."""
    things = {thing.cell: thing for thing in scene.objects}
    contents = [BACKGROUNDS.index(scene.background)]
    for cell in range(len(PLACES)):
        thing = things.get(cell)
        contents += (
            (0, 0, 0)
            if thing is None
            else (1 + SHAPES.index(thing.shape), 1 + COLOURS.index(thing.colour), 1 + SIZES.index(thing.size))
        )
    return contents


class SceneReader(nn.Module):
    """Reads `list_contents` linearly off an embedding, of a picture or a caption."""

    NUM_ANSWERS = (len(BACKGROUNDS), *(1 + len(SHAPES), 1 + len(COLOURS), 1 + len(SIZES)) * len(PLACES))
    NUM_FACTS = (
        6  # about what a scene has to say: the loss is per fact, not per place, most of which are empty
    )

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.answers = nn.Linear(embed_dim, sum(self.NUM_ANSWERS))

    def loss(self, embedding_ND: Tensor, contents_NQ: Tensor) -> Tensor:
        """Cross-entropies of all questions [N, Q], added up, a fact."""
        unit_ND = normalize(embedding_ND.float(), dim=-1) * self.embed_dim**0.5
        answers = self.answers(unit_ND).split(self.NUM_ANSWERS, dim=-1)
        parts = [cross_entropy(answer, contents_NQ[:, q]) for q, answer in enumerate(answers)]
        return torch.stack(parts).sum() / self.NUM_FACTS


class Trainer:
    """Model, reader, optimiser and tokenizer of a run."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.model = build_model(recipe)
        self.reader = SceneReader(recipe.embed_dim)
        self.trained = nn.ModuleDict({"clip": self.model, "reader": self.reader})
        autoencoder = Bagel.from_pretrained("mini", "cpu", torch.float32).autoencoder
        self.pictures = Pictures(recipe.pictures, autoencoder)
        self.names = {id(p): name for name, p in self.trained.named_parameters()}
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
            {"params": [*rest, *self.reader.parameters()], "weight_decay": 0.0},
        ]

    def step(self, number: int, seconds: float) -> float:
        """One step; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(number, seconds)
        loss = self.loss(np.random.default_rng([self.recipe.seed, number]))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(self.recipe.max_logit_scale))
        return float(loss.detach())

    def loss(self, rng: np.random.Generator) -> Tensor:
        """The loss of one batch."""
        options = self.recipe.pictures
        groups = self.pictures.draw(rng)
        scenes = [scene for group in groups for scene in group.scenes]
        own = [g * options.variants + c for g in range(len(groups)) for c in range(options.captions)]
        captions = [draw_caption(rng, scenes[number]) for number in own]
        pixels = torch.from_numpy(np.concatenate([group.pictures_NHWC for group in groups]))
        is_equal = torch.tensor([[scenes[m].key == scene.key for scene in scenes] for m in own])
        with torch.autocast("cpu", torch.bfloat16):
            picture_ND = self.model.encode_image(preprocess(pixels, self.recipe))
            caption_MD = self.model.encode_text(self.tokenize(captions))
        scale = self.model.logit_scale.exp()
        loss = contrast(picture_ND, caption_MD, torch.tensor(own), is_equal, scale)
        contents = torch.tensor([list_contents(scene) for scene in scenes])
        read = self.reader.loss(picture_ND, contents) + self.reader.loss(caption_MD, contents[own])
        return loss + self.recipe.reading * read

    def save_model(self) -> None:
        """The folder that open_clip loads."""
        tensors = {name: value.detach().contiguous() for name, value in self.model.state_dict().items()}
        temporary = self.folder / "model" / f".{WEIGHTS}"
        save_file(tensors, temporary)
        temporary.replace(self.folder / "model" / WEIGHTS)

    def save(self, step: int, seconds: float) -> None:
        """A checkpoint; the pool of decoded pictures is not kept, a new one is drawn."""
        tensors = self.trained.state_dict() | optimizer_tensors(self.optimizer, self.names)
        save_state(self.folder / "checkpoints", step, tensors, {"seconds": seconds})
        self.save_model()

    def resume(self) -> tuple[int, float]:
        """From the last checkpoint: the step to go on with, and the seconds that were spent."""
        found = load_state(self.folder / "checkpoints")
        if found is None:
            return 0, 0.0
        tensors, numbers = found
        self.trained.load_state_dict({name: tensors[name] for name in self.trained.state_dict()})
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
    for kind, table in ((Recipe, values), (PictureOptions, values.get("pictures", {}))):
        unknown = sorted(table.keys() - {f.name for f in fields(kind)})
        if unknown:
            raise ValueError(f"{path}: unknown {unknown[0]!r}")
    return Recipe(**{**values, "pictures": PictureOptions(**values.get("pictures", {}))})


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    train(load_recipe(args.recipe), args.out)


if __name__ == "__main__":
    main()
