"""philox_normal: the generator's known answers, the formula, and the same bits on every path."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realign_kernels import NoiseKeys, philox_normal
from realign_kernels.philox_normal.reference import (
    NUM_UNITS,
    cos_sin_of_turn,
    log_of_units,
    normals_from_words,
    philox,
)
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import IMPLS, KERNELS, needs_triton

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


def draw(lengths, channels, impl, seed=0):
    """Normals of samples with distinct keys, both halves of each in use, and steps up to the largest."""
    generator = torch.Generator().manual_seed(seed)
    key_B = torch.randint(-(2**63), 2**63 - 1, (len(lengths),), generator=generator)
    step_B = torch.tensor([ONES, 0, 7, 1])[torch.arange(len(lengths)) % 4]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    device = device_of(impl)
    keys = NoiseKeys(key_B.to(device), step_B.to(device))
    return philox_normal(keys, offsets.to(device), sum(lengths), channels, impl=impl).cpu()


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert tuple(philox(torch.tensor([counter]), torch.tensor([key]))[0].tolist()) == expected


@needs_triton
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers_in_triton(counter, key, expected):
    """The integers, through the function that the kernels call."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(p_key, p_counter, p_words):
        c0, c1 = tl.load(p_counter), tl.load(p_counter + 1)
        c2, c3 = tl.load(p_counter + 2), tl.load(p_counter + 3)
        u0, u1, u2, u3 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(tl.load(p_key), u0, u1, u2, u3)
        tl.store(p_words, w0.to(tl.int64))
        tl.store(p_words + 1, w1.to(tl.int64))
        tl.store(p_words + 2, w2.to(tl.int64))
        tl.store(p_words + 3, w3.to(tl.int64))

    device = device_of("triton")
    number = key[0] | key[1] << 32
    key_1 = torch.tensor([number - (1 << 64) if number >> 63 else number], device=device)
    words_4 = torch.empty(4, dtype=torch.int64, device=device)
    kernel[(1,)](key_1, torch.tensor(counter, device=device), words_4)
    assert tuple((words_4 & ONES).tolist()) == expected


def test_normals_are_the_formula():
    """Against float64, on the ends of both ranges, around the quarter turns, and at random."""
    edges = [0, 1, 2, (1 << 21) - 1, 1 << 21, 1 << 22, 1 << 23, 3 << 22, 5 << 21, 7 << 21, NUM_UNITS - 1]
    units = torch.cat([torch.tensor(edges), torch.randint(0, NUM_UNITS, (200_000,))])
    log = torch.log((units + 1).double() / NUM_UNITS)
    error = (log_of_units(units + 1).double() - log).abs()
    assert (error <= 2e-7 * log.abs()).all()
    turn = units.double() / NUM_UNITS * 2 * math.pi
    for ours, exact in zip(cos_sin_of_turn(units), (turn.cos(), turn.sin()), strict=True):
        assert (ours.double() - exact).abs().max() < 1.2e-7
    words_K4 = torch.stack((units, units.flip(0), units.roll(5), units.roll(11)), 1) << 8
    normals_K4 = normals_from_words(words_K4).double()
    for lane in (0, 2):
        radius = torch.sqrt(-2 * torch.log(((words_K4[:, lane] >> 8) + 1).double() / NUM_UNITS))
        turn = (words_K4[:, lane + 1] >> 8).double() / NUM_UNITS * 2 * math.pi
        assert (normals_K4[:, lane] - radius * turn.cos()).abs().max() < 1.1e-6
        assert (normals_K4[:, lane + 1] - radius * turn.sin()).abs().max() < 1.1e-6


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("channels", [1, 3, 4, 64, 65, 100])
def test_every_path_has_the_bits_of_the_reference(channels, impl):
    lengths = [5, 0, 42, 253]
    assert torch.equal(draw(lengths, channels, impl), draw(lengths, channels, "reference"))


@pytest.mark.parametrize("impl", KERNELS)
@given(lengths=st.lists(st.integers(0, 60), max_size=5), channels=st.integers(0, 70), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_any_sizes(impl, lengths, channels, seed):
    actual = draw(lengths, channels, impl, seed)
    assert actual.shape == (sum(lengths), channels)
    assert torch.equal(actual, draw(lengths, channels, "reference", seed))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_number_depends_on_its_key_its_step_and_its_place_alone(impl):
    together = draw([40, 3, 40, 7], 6, impl)
    assert torch.equal(draw([3], 6, impl), together[:3])  # a shorter sample is a prefix
    assert not torch.equal(together[:40], together[43:83])
    assert torch.equal(draw([40], 6, impl).flatten(), draw([240], 1, impl).flatten())


@pytest.mark.parametrize("impl", IMPLS)
def test_moments(impl):
    draws = draw([6000, 250], 64, impl).double().flatten()
    assert abs(draws.mean()) < 5 / math.sqrt(draws.numel())
    assert abs(draws.var() - 1) < 5 * math.sqrt(2 / draws.numel())
    assert abs((draws[:-1] * draws[1:]).mean()) < 5 / math.sqrt(draws.numel())


@needs_triton
def test_opcheck(monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    device = device_of("triton")
    from realign_kernels.philox_normal import triton as path

    arguments = (torch.tensor([3, -4]), torch.tensor([0, 1]), torch.tensor([0, 3, 5], dtype=torch.int32))
    assert path.philox_normal_triton is not None
    op = torch.ops.realign_kernels.philox_normal_triton.default
    torch.library.opcheck(op, (*(tensor.to(device) for tensor in arguments), 5, 6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_B": torch.zeros(2).int()}, r"noise.key_B is torch.int32 \(2,\): must be int64 \[2\]"),
        ({"step_B": torch.tensor([0])}, r"noise.step_B is torch.int64 \(1,\): must be int64 \[2\]"),
        (
            {"step_B": torch.tensor([0, 1 << 32])},
            r"noise.step_B\[1\] is 4294967296: must be from 0 to 4294967295",
        ),
        ({"step_B": torch.tensor([-1, 0])}, r"noise.step_B\[0\] is -1: must be from 0"),
        ({"num_channels": -1}, "num_channels is -1: must not be negative"),
        ({"num_tokens": 6}, r"cu_seqlens is \[0, 3, 5\]: must rise from 0 to the number of tokens, 6"),
        ({"impl": "gpu"}, "philox_normal: impl is 'gpu': must be one of auto, reference, cpp, triton"),
    ],
)
def test_bad_arguments(change, message):
    keys = {"key_B": torch.tensor([3, 4]), "step_B": torch.tensor([0, 1])}
    rest = {"cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32), "num_tokens": 5, "num_channels": 6}
    rest["impl"] = "auto"
    for name, value in change.items():
        (keys if name in keys else rest)[name] = value
    with pytest.raises(ValueError, match=message):
        philox_normal(NoiseKeys(**keys), **rest)
