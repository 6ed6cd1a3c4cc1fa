"""What the mini CLIP is trained on: groups of a scene's pictures, and of pictures with a single thing wrong.

A part of them has gone through mini's autoencoder, with noise on the latents: what generated pictures look
like. Captions are those of IC-CoT, their objects in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from realign.model.autoencoder import Autoencoder
from realign.world.language import write_caption
from realign.world.render import render
from realign.world.scene import MAX_OBJECTS, Scene, sample_scene
from realign.world.variants import draw_variant


@dataclass(frozen=True)
class PictureOptions:
    """The pictures of a batch.

    Attributes:
        groups: scenes of a batch, each with `variants` pictures (itself the first).
        captions: so many pictures of a group have a caption.
        kinds: how often each kind of variant is drawn, relative to the others.
        decoded: share of the groups that were through the autoencoder.
        latent_noise: the largest deviation of the noise on their latents, which have unit variance.
        pool: decoded groups that are kept; `fresh` of them are new in each step.
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


@dataclass(frozen=True)
class Group:
    """A scene, and its variants; the first `captions` scenes have captions.

    Attributes:
        scenes: the first is what the others are variants of.
        pictures_NHWC: uint8 [variants, 64, 64, 3].
    """

    scenes: tuple[Scene, ...]
    pictures_NHWC: np.ndarray


def draw_scenes(rng: np.random.Generator, options: PictureOptions) -> tuple[Scene, ...]:
    """A training scene and its variants; no more objects than a caption names where they are to have one."""
    while (anchor := sample_scene(rng, int(rng.integers(1, MAX_OBJECTS + 1)))).split != "train":
        pass
    kinds, weights = list(options.kinds), np.array(list(options.kinds.values()))
    scenes = [anchor]
    while len(scenes) < options.variants:
        variant = draw_variant(rng, anchor, str(rng.choice(kinds, p=weights / weights.sum())))
        fits = variant is not None and (
            len(variant.objects) <= MAX_OBJECTS or len(scenes) >= options.captions
        )
        if fits:
            scenes.append(variant)
    return tuple(scenes)


def draw_caption(rng: np.random.Generator, scene: Scene) -> str:
    """A scene's caption, its objects in any order."""
    return write_caption([scene.objects[i] for i in rng.permutation(len(scene.objects))], scene.background)


class Pictures:
    """Draws groups: rendered, or out of a pool of decoded ones that is renewed bit by bit."""

    def __init__(self, options: PictureOptions, autoencoder: Autoencoder) -> None:
        self._options, self._autoencoder = options, autoencoder
        self._pool: list[Group] = []

    def draw(self, rng: np.random.Generator) -> list[Group]:
        """The groups of a step."""
        options = self._options
        while len(self._pool) < min(2 * options.groups, options.pool):
            self._pool.append(self._decode(rng))
        for _ in range(options.fresh):
            self._pool.append(self._decode(rng))
        del self._pool[: max(0, len(self._pool) - options.pool)]
        num_decoded = round(options.decoded * options.groups)
        chosen = [self._pool[i] for i in rng.choice(len(self._pool), num_decoded, replace=False)]
        return chosen + [self._render(rng) for _ in range(options.groups - num_decoded)]

    def _render(self, rng: np.random.Generator) -> Group:
        scenes = draw_scenes(rng, self._options)
        return Group(scenes, np.stack([render(scene) for scene in scenes]))

    def _decode(self, rng: np.random.Generator) -> Group:
        group = self._render(rng)
        noise = self._options.latent_noise * float(rng.random())
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
