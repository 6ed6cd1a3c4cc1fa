"""Times, places and grids."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from realign.model.bagel import Bagel, patchify_latent, patchify_pixels, unpatchify_latent
from realign.model.embeddings import build_sincos_table, find_activation, flattened_position_ids

from .helpers import relative_error


def test_golden_times(golden_model: Bagel, golden: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        embedded = golden_model.time_embedder(golden["time.t"])
    assert relative_error(embedded, golden["time.embedding"]) < 1e-5


def test_sincos_table_is_the_checkpoints(golden_model: Bagel) -> None:
    table = build_sincos_table(16, 64)
    torch.testing.assert_close(table, golden_model.vit_position.pos_embed.data, rtol=0, atol=1e-7)
    torch.testing.assert_close(table, golden_model.latent_position.pos_embed.data, rtol=0, atol=1e-7)
    assert not golden_model.vit_position.pos_embed.requires_grad


def test_position_ids() -> None:
    assert flattened_position_ids(2, 3, 10).tolist() == [0, 1, 2, 10, 11, 12]
    assert flattened_position_ids(1, 2, 4, interpolate=True).tolist() == [0, 2]
    for side in (1, 3, 7, 16):
        full = flattened_position_ids(side, side, side, interpolate=True)
        assert full.tolist() == list(range(side * side))


def test_interpolated_positions_spread_over_the_table() -> None:
    for count, side in ((3, 16), (5, 16), (13, 70), (70, 70)):
        columns = flattened_position_ids(1, count, side, interpolate=True)
        exact = [Fraction(i * side, count) for i in range(count)]
        # float32 steps may put a fraction that meets a bin's edge on either side of it
        for column, place in zip(columns.tolist(), exact, strict=True):
            assert column == int(place) or (place.denominator == 1 and column == int(place) - 1)


@pytest.mark.parametrize(("height", "width"), [(0, 3), (3, 0), (17, 1), (1, 17)])
def test_grids_that_do_not_fit(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height}x{width} patches: each side must be from 1 to 16"):
        flattened_position_ids(height, width, 16)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        find_activation("swish")


def test_golden_patches(golden: dict[str, torch.Tensor]) -> None:
    pixels_CHW = golden["image.0"].permute(2, 0, 1).float() / 127.5 - 1
    patches_LP = patchify_pixels(pixels_CHW[:, :42, :56], 14)
    torch.testing.assert_close(patches_LP, golden["vit.patches"][:12])


@pytest.mark.parametrize(("height", "width", "patch"), [(1, 1, 1), (3, 2, 2), (5, 1, 3)])
def test_patches_and_back(height: int, width: int, patch: int) -> None:
    latent_CHW = torch.randn(4, height * patch, width * patch)
    latent_LC = patchify_latent(latent_CHW, patch)
    assert latent_LC.shape == (height * width, 4 * patch**2)
    first = latent_CHW[:, :patch, :patch].permute(1, 2, 0).flatten()
    assert torch.equal(latent_LC[0], first)
    assert torch.equal(unpatchify_latent(latent_LC, height, width, patch), latent_CHW)


def test_patches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="5x4 cannot be cut into patches of 2x2"):
        patchify_latent(torch.zeros(3, 5, 4), 2)
    with pytest.raises(ValueError, match="6 tokens are not a grid of 2x2"):
        unpatchify_latent(torch.zeros(6, 12), 2, 2, 2)


def test_embed_latent_takes_one_time_for_all(golden_model: Bagel) -> None:
    latent_LC, position_L = torch.randn(6, 16), flattened_position_ids(2, 3, 16)
    with torch.no_grad():
        one = golden_model.embed_latent(latent_LC, torch.tensor([0.3]), position_L)
        each = golden_model.embed_latent(latent_LC, torch.full((6,), 0.3), position_L)
    torch.testing.assert_close(one, each, rtol=0, atol=1e-6)
