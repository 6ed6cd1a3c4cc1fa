"""Definition of `philox_normal` in plain torch.

Only additions, multiplications, one division and square roots of float32, each rounded once and none fused:
so every path gives the same bits on every device. B samples, L packed tokens, C channels, K blocks of four
numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
NUM_UNITS = 1 << 24  # a random number is one of so many: what float32 holds exactly

# ln 2 in two parts: the first has so few bits that its product with an exponent is exact.
LN2_HIGH = 0x2C5C8 * 2.0**-18
LN2_LOW = math.log(2.0) - LN2_HIGH
SQRT_HALF_BITS = 0x3F3504F3
ONE_BITS = 0x3F800000


def philox_normal_reference(key_B: Tensor, step_B: Tensor, cu_seqlens: Tensor, num_channels: int) -> Tensor:
    """Float32 [L, C]: number `e` of a sample is lane `e % 4` of its block `e // 4`."""
    lengths = cu_seqlens.diff().tolist()
    sizes = [length * num_channels for length in lengths]
    num_blocks = [-(-size // 4) for size in sizes]
    block_K = torch.cat([torch.arange(n, device=key_B.device) for n in num_blocks] or [key_B.new_empty(0)])
    repeats_B = torch.tensor(num_blocks, device=key_B.device, dtype=torch.int64)
    step_K, key_K = (number_B.repeat_interleave(repeats_B) for number_B in (step_B, key_B))
    counter_K4 = torch.stack((block_K, step_K, torch.zeros_like(block_K), torch.zeros_like(block_K)), 1)
    key_K2 = torch.stack((key_K & MASK, (key_K >> 32) & MASK), 1)
    normals = normals_from_words(philox(counter_K4, key_K2)).split(num_blocks)
    samples = [block_K4.flatten()[:size] for block_K4, size in zip(normals, sizes, strict=True)]
    return torch.cat(samples or [torch.empty(0, device=key_B.device)]).view(sum(lengths), num_channels)


def philox(counter_K4: Tensor, key_K2: Tensor) -> Tensor:
    """Philox4x32-10: counters [K, 4] and keys [K, 2] to random words [K, 4]; 32-bit words in int64."""
    c0, c1, c2, c3 = counter_K4.unbind(1)
    k0, k1 = key_K2.unbind(1)
    for _ in range(NUM_ROUNDS):
        # A product of two 32-bit words wraps to a signed 64-bit one; shift and mask still give its two words.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return torch.stack((c0, c1, c2, c3), dim=1)


def normals_from_words(words_K4: Tensor) -> Tensor:
    """Box-Muller: words [K, 4] to normals, float32 [K, 4]; lanes (0, 1) and (2, 3) are pairs."""
    units_K4 = words_K4 >> 8
    # By way of float64, because torch's float32 root on a CPU is not always the nearest number.
    radius_K2 = (log_of_units(units_K4[:, 0::2] + 1) * -2.0).double().sqrt().float()
    cos_K2, sin_K2 = cos_sin_of_turn(units_K4[:, 1::2])
    return torch.stack((radius_K2 * cos_K2, radius_K2 * sin_K2), dim=2).flatten(1)


def log_of_units(units: Tensor) -> Tensor:
    """`ln(units / 2**24)`, float32, for integers from 1 to 2**24.

    With `x = 2**k (1 + f)`, `1 + f` from the root of 1/2 to that of 2: `k ln 2 + 2 atanh(f / (2 + f))`, by
    series.
    """
    bits = (units.to(torch.float32) * 2.0**-24).view(torch.int32) + (ONE_BITS - SQRT_HALF_BITS)
    exponent = ((bits >> 23) - 127).to(torch.float32)
    f = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1.0
    s = f / (f + 2.0)
    z = s * s
    series = (((z * (2.0 / 9) + 2.0 / 7) * z + 2.0 / 5) * z + 2.0 / 3) * z
    return exponent * LN2_HIGH + (s * 2.0 + (s * series + exponent * LN2_LOW))


def cos_sin_of_turn(units: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `units / 2**24` of a turn, float32, for integers from 0 to 2**24 - 1.

    The nearest quarter turn is taken off exactly, in integers; the rest, an eighth at most, goes by series.
    """
    quarter = (units + (1 << 21)) >> 22
    angle = (units - (quarter << 22)).to(torch.float32) * (2.0 * math.pi / NUM_UNITS)
    z = angle * angle
    sin = ((((z * (1 / 362880) - 1 / 5040) * z + 1 / 120) * z - 1 / 6) * z) * angle + angle
    cos = ((((z * (-1 / 3628800) + 1 / 40320) * z - 1 / 720) * z + 1 / 24) * z - 0.5) * z + 1.0
    is_odd, is_back, is_down = quarter % 2 == 1, (quarter + 1) % 4 >= 2, quarter % 4 >= 2
    across, up = torch.where(is_odd, sin, cos), torch.where(is_odd, cos, sin)
    return torch.where(is_back, -across, across), torch.where(is_down, -up, up)
