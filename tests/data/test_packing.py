"""Packing: BAGEL's layout of turns, and a forward that keeps samples apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from realign.data.packing import LatentTurn, Packer, TextTurn, Turn, ViTTurn
from realign.model.bagel import Bagel
from realign.model.embeddings import flattened_position_ids
from realign.model.training import packed_losses

GOLDEN = Path(__file__).parents[1] / "fixtures" / "bagel-tiny" / "checkpoint"


@pytest.fixture(scope="module")
def model() -> Bagel:
    return Bagel.from_pretrained(GOLDEN)


@pytest.fixture(scope="module")
def packer(model: Bagel) -> Packer:
    return Packer(model.tokenizer, model.config.vit.patch_dim, model.config.latent_dim)


def draw_sample(model: Bagel, seed: int, rows: int = 2) -> list[Turn]:
    """Text, a reference as latents and patches, an answer with a loss, a noised picture."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    config = model.config
    latent_position = flattened_position_ids(rows, 3, config.max_latent_size)
    patch_position = flattened_position_ids(rows, 2, config.vit_max_num_patch_per_side)
    tokens = rows * 3
    return [
        TextTurn(model.tokenizer.encode("draw a mug")),
        LatentTurn(draw(tokens, config.latent_dim), latent_position),
        ViTTurn(draw(rows * 2, config.vit.patch_dim), patch_position),
        TextTurn(model.tokenizer.encode("a red mug" * seed), has_loss=True),
        LatentTurn(draw(tokens, config.latent_dim), latent_position, 0.6, draw(tokens, config.latent_dim)),
    ]


def test_layout(model: Bagel, packer: Packer) -> None:
    turns = draw_sample(model, seed=1)
    batch = packer.pack([turns])
    first, answer = len(turns[0].ids) + 2, len(turns[3].ids) + 2
    (lens, modes), token = batch.splits[0], model.tokenizer
    assert lens == [first, 8, 6, answer, 8]
    assert modes == ["causal", "full", "full", "causal", "noise"]
    assert batch.position_ids[:first].tolist() == list(range(first))
    assert batch.position_ids[first : first + 14].tolist() == [first] * 8 + [first + 1] * 6
    assert batch.position_ids[-8:].unique().tolist() == [first + 2 + answer]
    texts = dict(zip(batch.text_index.tolist(), batch.text_ids.tolist(), strict=True))
    assert [texts[first], texts[first + 7]] == [token.start_of_image, token.end_of_image]
    assert (texts[0], texts[first - 1]) == (token.bos, token.eos)
    assert batch.labels.tolist() == [*turns[3].ids, token.eos]
    assert [texts[i] for i in batch.ce_index.tolist()] == [token.bos, *turns[3].ids]
    assert batch.timestep.tolist() == pytest.approx([0.0] * 6 + [0.6] * 6)
    assert batch.mse_index.tolist() == batch.latent_index[6:].tolist()


def test_samples_do_not_see_each_other(model: Bagel, packer: Packer) -> None:
    """Losses alone, packed, in another order, and with filling are the same; buckets hold unequal lengths."""
    samples = [draw_sample(model, seed, rows=1 + seed % 3) for seed in (1, 2, 3, 9)]
    alone = [packed_losses(model, packer.pack([turns])) for turns in samples]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        batch = packer.pack([samples[i] for i in order], multiple=64)
        assert (len(batch.text_ids) + len(batch.vit_index)) % 64 == 0
        together = packed_losses(model, batch)
        torch.testing.assert_close(together.ce, torch.cat([alone[i].ce for i in order]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            together.mse, torch.cat([alone[i].mse for i in order]), rtol=1e-4, atol=1e-5
        )


def test_nothing_sees_a_noised_picture(model: Bagel, packer: Packer) -> None:
    """A text after it has the same loss whatever the noise."""
    turns = draw_sample(model, seed=2)
    noised = turns[-1]
    other = LatentTurn(noised.latent * 2, noised.position, noised.timestep, -noised.noise)
    losses = [packed_losses(model, packer.pack([[*turns[:3], t, turns[3]]])).ce for t in (noised, other)]
    assert torch.equal(*losses)


def test_text_alone_packs(model: Bagel, packer: Packer) -> None:
    losses = packed_losses(model, packer.pack([[TextTurn([5, 6, 7], has_loss=True)]]))
    assert losses.ce.shape == (4,)
    assert losses.mse.shape == (0, model.config.latent_dim)
