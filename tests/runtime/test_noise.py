"""Philox against Random123's known answers, and what the noise may depend on."""

from __future__ import annotations

import math

import pytest
import torch

from realign.runtime.noise import NoiseKey, normal, normals, token_uniforms
from realign_kernels.philox_normal.reference import philox

ONES = 0xFFFFFFFF
# Random123 1.14, kat_vectors, philox4x32-10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert tuple(philox(torch.tensor([counter]), torch.tensor([key]))[0].tolist()) == expected


def test_normals_are_those_of_the_documented_layout():
    key = NoiseKey(seed=7, request_id="cat", picture=2, stream="sde", step=5)
    words_of_key = torch.tensor([[key.number() & ONES, (key.number() >> 32) & ONES]])
    words = [philox(torch.tensor([[block, 5, 0, 0]]), words_of_key)[0].tolist() for block in range(2)]
    expected = []
    for block in words:
        for first, second in (block[:2], block[2:]):
            radius = math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24))
            angle = 2 * math.pi * (second >> 8) / 2**24
            expected += [radius * math.cos(angle), radius * math.sin(angle)]
    torch.testing.assert_close(normal(key, (7,)), torch.tensor(expected[:7]), rtol=0, atol=1e-6)


def test_key_is_pinned():
    """The hash's input and reading are a format: recorded noise must stay reproducible."""
    assert NoiseKey(0, "a").number() == 618492503 + (858815378 << 32)


def test_every_part_of_the_key_matters():
    base = NoiseKey(1, "a", 0, "initial", 0)
    others = [
        NoiseKey(2, "a"),
        NoiseKey(1, "b"),
        NoiseKey(1, "a", 1),
        NoiseKey(1, "a", 0, "sde"),
        NoiseKey(1, "a", 0, "initial", 1),
    ]
    for other in others:
        assert not torch.equal(normal(base, (8,)), normal(other, (8,)))


def test_noise_is_the_same_in_any_company():
    keys = [NoiseKey(seed, f"r{seed}") for seed in range(4)]
    sizes = [5, 0, 16, 1]
    for key, size, drawn in zip(keys, sizes, normals(keys, sizes), strict=True):
        assert torch.equal(drawn[:, 0], normal(key, (size,)))
    alone = torch.cat([token_uniforms([key], 5) for key in keys])
    assert torch.equal(token_uniforms(keys, 3), alone[:, :3])


def test_a_prefix_is_the_same_noise():
    key = NoiseKey(3, "x")
    assert torch.equal(normal(key, (4, 4)).flatten()[:6], normal(key, (6,)))


def test_moments_and_ranges():
    draws = normal(NoiseKey(0, "moments"), (400_000,)).double()
    assert abs(draws.mean()) < 5 / math.sqrt(400_000)
    assert abs(draws.var() - 1) < 5 * math.sqrt(2 / 400_000)
    assert abs((draws**4).mean() - 3) < 5 * math.sqrt(96 / 400_000)
    assert abs((draws[:-1] * draws[1:]).mean()) < 5 / math.sqrt(400_000)
    keys = [NoiseKey(0, f"unit {number}", stream="text") for number in range(500)]
    units = token_uniforms(keys, 200)
    assert units.min() >= 0
    assert units.max() < 1
    assert abs(units.mean() - 0.5) < 0.005


@pytest.mark.parametrize("bad", [{"stream": "other"}, {"step": -1}, {"step": 2**32}])
def test_bad_keys_are_refused(bad):
    with pytest.raises(ValueError, match=r"noise (stream|step) is"):
        NoiseKey(0, "a", **bad)
