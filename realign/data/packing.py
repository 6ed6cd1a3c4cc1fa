"""Packs samples of text and picture turns into one sequence, as BAGEL trains on them (2505.14683, section
2.3).

A text turn is bos + ids + eos with running positions; a picture turn is start-of-image + tokens +
end-of-image, all at one position. A turn with a loss is what the model must produce: text predicts its next
tokens, a noised picture its velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from realign.model.tokenizer import Tokenizer
from realign.model.training import PackedBatch


@dataclass(frozen=True)
class TextTurn:
    """Token ids without bos and eos; `has_loss` where the model is to write them."""

    ids: Sequence[int]
    has_loss: bool = False


@dataclass(frozen=True)
class ViTTurn:
    """A picture for understanding: patches [V, P] and their flattened positions [V]."""

    patches: Tensor
    position: Tensor


@dataclass(frozen=True)
class LatentTurn:
    """A picture's latents [G, C] and positions [G]: clean, or with `noise` [G, C] to mix in at `timestep`."""

    latent: Tensor
    position: Tensor
    timestep: float = 0.0
    noise: Tensor | None = None


Turn = TextTurn | ViTTurn | LatentTurn


class Packer:
    """Lays turns out one after another; `pack` makes the batch."""

    def __init__(self, tokenizer: Tokenizer, patch_dim: int, latent_dim: int) -> None:
        self.tokenizer = tokenizer
        self.patch_dim = patch_dim
        self.latent_dim = latent_dim

    def pack(self, samples: Sequence[Sequence[Turn]], multiple: int = 1) -> PackedBatch:
        """One packed batch.

        Args:
            samples: each a list of turns; a noised picture is a sample's last turn.
            multiple: the number of understanding tokens is rounded up to it, by a last sample that has no
                loss: kernels that are prepared for each shape then meet few shapes.
        """
        layout = _Layout(self.tokenizer)
        for turns in samples:
            layout.begin_sample()
            for turn in turns:
                layout.add(turn)
        layout.fill(multiple)
        latent = torch.cat(layout.latents) if layout.latents else torch.zeros(0, self.latent_dim)
        patches = torch.cat(layout.patches) if layout.patches else torch.zeros(0, self.patch_dim)
        return PackedBatch(
            splits=layout.splits,
            position_ids=torch.tensor(layout.positions),
            text_ids=torch.tensor(layout.text_ids, dtype=torch.long),
            text_index=torch.tensor(layout.text_index, dtype=torch.long),
            vit_patches=patches,
            vit_position=_cat_long(layout.patch_positions),
            vit_cu_seqlens=torch.tensor([0, *(len(p) for p in layout.patches)]).cumsum(0).int(),
            vit_index=torch.tensor(layout.vit_index, dtype=torch.long),
            latent=latent,
            latent_position=_cat_long(layout.latent_positions),
            latent_index=torch.tensor(layout.latent_index, dtype=torch.long),
            timestep=torch.tensor(layout.timesteps, dtype=torch.float32),
            noise=torch.cat(layout.noises) if layout.noises else torch.zeros_like(latent),
            ce_index=torch.tensor(layout.ce_index, dtype=torch.long),
            labels=torch.tensor(layout.labels, dtype=torch.long),
            mse_index=torch.tensor(layout.mse_index, dtype=torch.long),
        )


def _cat_long(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


class _Layout:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.length, self.rope = 0, 0
        self.splits: list[tuple[list[int], list[str]]] = []
        self.positions: list[int] = []
        self.text_ids: list[int] = []
        self.text_index: list[int] = []
        self.patches: list[Tensor] = []
        self.patch_positions: list[Tensor] = []
        self.vit_index: list[int] = []
        self.latents: list[Tensor] = []
        self.latent_positions: list[Tensor] = []
        self.latent_index: list[int] = []
        self.timesteps: list[float] = []
        self.noises: list[Tensor] = []
        self.ce_index: list[int] = []
        self.labels: list[int] = []
        self.mse_index: list[int] = []

    def begin_sample(self) -> None:
        self.rope = 0
        self.splits.append(([], []))

    def add(self, turn: Turn) -> None:
        if isinstance(turn, TextTurn):
            self._add_text(turn)
        elif isinstance(turn, ViTTurn):
            self.patches.append(turn.patches)
            self.patch_positions.append(turn.position)
            self.vit_index.extend(self._add_picture(len(turn.patches), "full"))
        else:
            noised = turn.noise is not None
            self.noises.append(turn.noise if noised else torch.zeros_like(turn.latent))
            index = self._add_picture(len(turn.latent), "noise" if noised else "full")
            self.latents.append(turn.latent)
            self.latent_positions.append(turn.position)
            self.latent_index.extend(index)
            self.timesteps.extend([turn.timestep] * len(turn.latent))
            if noised:
                self.mse_index.extend(index)

    def fill(self, multiple: int) -> None:
        short = -(len(self.text_ids) + len(self.vit_index)) % multiple
        if short:
            self.begin_sample()
            start = self._advance(short, "causal")
            self.text_ids.extend([self.tokenizer.eos] * short)
            self.text_index.extend(range(start, self.length))
            self.positions.extend(range(short))

    def _add_text(self, turn: TextTurn) -> None:
        ids = [self.tokenizer.bos, *turn.ids, self.tokenizer.eos]
        start = self._advance(len(ids), "causal")
        self.text_ids.extend(ids)
        self.text_index.extend(range(start, self.length))
        self.positions.extend(range(self.rope, self.rope + len(ids)))
        self.rope += len(ids)
        if turn.has_loss:
            self.ce_index.extend(range(start, self.length - 1))
            self.labels.extend(ids[1:])

    def _add_picture(self, num_tokens: int, mode: str) -> range:
        start = self._advance(num_tokens + 2, mode)
        self.text_ids.extend((self.tokenizer.start_of_image, self.tokenizer.end_of_image))
        self.text_index.extend((start, self.length - 1))
        self.positions.extend([self.rope] * (num_tokens + 2))
        self.rope += 1
        return range(start + 1, self.length - 1)

    def _advance(self, length: int, mode: str) -> int:
        lens, modes = self.splits[-1]
        lens.append(length)
        modes.append(mode)
        start, self.length = self.length, self.length + length
        return start
