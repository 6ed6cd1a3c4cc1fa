"""Resize rules, transparency, and the way from pixels to pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from realign.model.config import ResizeRule
from realign.runtime.prepare import crop_picture, fit_picture, resized_size, to_picture, to_pixels, to_rgb

sides = st.integers(1, 5000)


@given(width=sides, height=sides)
def test_resized_sides_are_multiples_within_bounds(width, height):
    rule = ResizeRule(1024, 512, 16)
    resized = resized_size((width, height), rule)
    assert all(side % 16 == 0 and 16 <= side <= 1024 for side in resized)
    assert resized_size((height, width), rule) == resized[::-1]
    if min(width, height) >= 512 and max(width, height) <= 1024:
        assert max(abs(resized[0] - width), abs(resized[1] - height)) <= 8


def test_both_views_come_from_the_rules(model):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8))
    prepared = fit_picture(image, model.config)
    assert (prepared.width, prepared.height) == resized_size((200, 300), model.config.vae_resize)
    vit_size = resized_size((prepared.width, prepared.height), model.config.vit_resize)
    assert prepared.vit_CHW.shape == (3, *vit_size[::-1])


def test_cropping_keeps_whole_patches(model):
    image = Image.fromarray(np.arange(50 * 35 * 3, dtype=np.uint8).reshape(50, 35, 3))
    prepared = crop_picture(image, model.config)
    assert prepared.vae_CHW.shape == (3, 48, 32)
    assert prepared.vit_CHW.shape == (3, 42, 28)
    assert torch.equal(prepared.vit_CHW, to_pixels(image)[:, :42, :28])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (4, 3))).mode == "RGB"


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert list(to_rgb(image).tobytes()) == [10, 20, 30, 255, 255, 255]


def test_levels_survive_the_way_to_pixels_and_back():
    """The way back cuts, as BAGEL's does: a level may lose one to rounding, never more."""
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    back = np.asarray(to_picture(to_pixels(Image.fromarray(levels)))).astype(int)
    assert set(np.unique(levels - back)) <= {0, 1}
    assert np.asarray(to_picture(torch.full((3, 1, 1), 7.0))).max() == 255
    assert np.asarray(to_picture(torch.full((3, 1, 1), -7.0))).max() == 0
