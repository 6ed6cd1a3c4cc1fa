"""The world as training data: turns of every task and mode in fixed proportions, a function of (seed, step,
slot).

Scenes are encoded once, before training, into a pool of latents (a scene's picture never changes);
instructions, references' order, open choices and IC-CoTs are drawn anew for every sample.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from realign.data.packing import LatentTurn, TextTurn, Turn, ViTTurn
from realign.model.bagel import Bagel, patchify_pixels
from realign.reasoning.prompts import SYSTEM_TEXTS
from realign.reasoning.schemas import format_iccot
from realign.runtime.context import encode_latents, latent_position_ids, vit_position_ids
from realign.runtime.prepare import to_pixels
from realign.runtime.schedule import shift_time
from realign.world.render import SIZE, Reference, render
from realign.world.scene import SIZES, Object
from realign.world.tasks import TASKS, sample

ENCODE_BATCH = 128
MODES = ("none", "ic-cot")


@dataclass(frozen=True)
class Mixture:
    """How many samples of each (task, reasoning mode) a step holds, and how often guidance's conditions are
    dropped.

    Attributes:
        counts: samples a step, keyed "task/mode".
        text_dropout: probability that the instruction and the reasoning are left out.
        image_dropout: probability that the references and the reasoning are left out (text-to-image: nothing
            to drop).
        num_scenes: size of each pool of scenes.
        timestep_shift: of the logit-normal times.
    """

    counts: dict[str, int]
    text_dropout: float
    image_dropout: float
    num_scenes: int
    timestep_shift: float

    def __post_init__(self) -> None:
        for task, mode in self.kinds():
            if task not in TASKS or mode not in MODES:
                known = f"a task of {', '.join(TASKS)}, a mode of {', '.join(MODES)}"
                raise ValueError(f"mixture counts {task}/{mode}: a key is task/mode, {known}")

    def kinds(self) -> list[tuple[str, str]]:
        """The (task, mode) of each slot of a step."""
        split = ((*key.partition("/")[::2], count) for key, count in self.counts.items())
        return [(task, mode) for task, mode, count in split for _ in range(count)]


class LatentPool:
    """Patchified latents of the scenes of each task, as float16 arrays on disk, memory-mapped.

    Each is [num_scenes, G, C]; text-to-image has the targets of in-context generation.
    """

    def __init__(self, folder: Path, model: Bagel, num_scenes: int, seed: int) -> None:
        self.num_scenes = num_scenes
        self._arrays: dict[str, np.ndarray] = {}
        for name in ("in_context.target", "edit.target", "edit.source"):
            path = folder / f"{name}-{num_scenes}-{seed}.npy"
            if not path.exists():
                _encode_pool(path, name, model, num_scenes, seed)
            self._arrays[name] = np.load(path, mmap_mode="r")

    def target(self, task: str, index: int) -> Tensor:
        """Latents [G, C] of sample `index`'s target."""
        return self._take(f"{'edit' if task == 'edit' else 'in_context'}.target", index)

    def source(self, index: int) -> Tensor:
        """Latents [G, C] of the picture that sample `index` edits."""
        return self._take("edit.source", index)

    def _take(self, name: str, index: int) -> Tensor:
        return torch.from_numpy(self._arrays[name][index % self.num_scenes].astype(np.float32))


def _encode_pool(path: Path, name: str, model: Bagel, num_scenes: int, seed: int) -> None:
    task, part = name.split(".")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npy")
    array = None
    for start in range(0, num_scenes, ENCODE_BATCH):
        drawn = [sample(task, i, seed) for i in range(start, min(start + ENCODE_BATCH, num_scenes))]
        scenes = [d.target if part == "target" else d.instruction.source for d in drawn]
        with torch.autocast(model.device.type, torch.bfloat16):
            latents = encode_pictures(model, np.stack([render(s) for s in scenes]))
        if array is None:
            shape = (num_scenes, *latents.shape[1:])
            array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        array[start : start + len(latents)] = latents.numpy()
    array.flush()
    partial.rename(path)


@torch.no_grad()
def encode_pictures(model: Bagel, pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] to patchified latents [N, G, C], float32 on the CPU."""
    return torch.stack(encode_latents(model, [to_pixels(picture) for picture in pictures])).float().cpu()


class WorldData:
    """Draws the turns of any slot of any step; `model` encodes the references, and has the tokenizer."""

    def __init__(self, model: Bagel, mixture: Mixture, pool: LatentPool, seed: int) -> None:
        self.model, self.mixture, self.pool, self.seed = model, mixture, pool, seed
        self.kinds = mixture.kinds()
        self._latent_of_reference = cache(self._encode_reference)

    def step_samples(self, step: int, rank: int, world_size: int) -> list[list[Turn]]:
        """The samples of a step that fall to a process: slots rank, rank + world_size, ..."""
        return [self.turns(step, slot) for slot in range(rank, len(self.kinds), world_size)]

    def turns(self, step: int, slot: int) -> list[Turn]:
        """One training sample."""
        task, mode = self.kinds[slot]
        rng = np.random.default_rng([self.seed, step, slot])
        index = step * len(self.kinds) + slot
        drawn = sample(task, index, self.seed, num_scenes=self.mixture.num_scenes)
        drop = rng.random()
        drop_text = drop < self.mixture.text_dropout
        drop_images = (
            not drop_text and drop < self.mixture.text_dropout + self.mixture.image_dropout and task != "t2i"
        )
        turns: list[Turn] = []
        if system := SYSTEM_TEXTS.get(mode):
            turns.append(self._text(system))
        if not drop_images:
            for number, reference in enumerate(drawn.references):
                is_source = task == "edit" and number == 0
                turns += self._picture(reference, self.pool.source(index) if is_source else None)
        if not drop_text:
            turns.append(self._text(drawn.text))
        if mode == "ic-cot" and not drop_text and not drop_images:
            turns.append(self._text(format_iccot(drawn.iccot), has_loss=True))
        turns.append(self._target(self.pool.target(task, index), rng))
        return turns

    def _text(self, text: str, has_loss: bool = False) -> TextTurn:
        return TextTurn(self._ids(text), has_loss)

    def _ids(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text)

    def _picture(self, reference: Reference, latent: Tensor | None) -> list[Turn]:
        side = reference.picture.shape[0]
        if latent is None:
            latent = self._latent_of_reference(_look(reference.shows))
        patches = patchify_pixels(to_pixels(reference.picture), self.model.config.vit.patch_size)
        return [
            LatentTurn(latent, latent_position_ids(self.model, side, side).cpu()),
            ViTTurn(patches, vit_position_ids(self.model, side, side).cpu()),
        ]

    def _encode_reference(self, look: Object | str) -> Tensor:
        of = Reference.of_background if isinstance(look, str) else Reference.of_object
        return encode_pictures(self.model, of(look).picture[None])[0]

    def _target(self, latent: Tensor, rng: np.random.Generator) -> LatentTurn:
        even = 1 / (1 + np.exp(-rng.standard_normal()))
        time = float(shift_time(even, self.mixture.timestep_shift))
        noise = torch.from_numpy(rng.standard_normal(latent.shape, dtype=np.float32))
        return LatentTurn(latent, latent_position_ids(self.model, SIZE, SIZE).cpu(), time, noise)


def _look(shows: Object | str) -> Object | str:
    """What a reference picture depends on: of an object, neither its place nor its size."""
    return shows if isinstance(shows, str) else replace(shows, cell=0, size=SIZES[0])
