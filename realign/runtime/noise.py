"""Names of every random number of generation: a number is a pure function of what it is for.

The generator is Philox4x32-10; normals are those of `realign_kernels.philox_normal`, the same bits on every
device. The layout is:

- key: the first 8 bytes of BLAKE2b (`digest_size=8`) of the UTF-8 text
  `"{seed}/{picture}/{stream}/{request_id}"`, read as a little-endian 64-bit number; its low word is key word
  0, its high word key word 1.
- counter: word 0 is the block number, word 1 the step, words 2 and 3 are 0. Element `e` is lane `e % 4` of
  block `e // 4`.
- uniform (of text): `(word >> 8) * 2**-24`, in [0, 1), exact in float32.

So a sample's noise depends on its request alone, never on its batch, its place in it, or what was drawn
before. K keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

import torch
from torch import Tensor

from realign_kernels import NoiseKeys, philox_normal
from realign_kernels.philox_normal.reference import MASK, philox

STREAMS = ("initial", "sde", "text")


@dataclass(frozen=True)
class NoiseKey:
    """What a random number is for: a request's seed and id, which picture (or text turn) of it, and which
    stream.

    `step` is the sampler's step for "sde", 0 for "initial", and the token number for "text".
    """

    seed: int
    request_id: str
    picture: int = 0
    stream: str = "initial"
    step: int = 0

    def __post_init__(self) -> None:
        if self.stream not in STREAMS:
            raise ValueError(f"noise stream is {self.stream!r}: must be one of {', '.join(STREAMS)}")
        if not 0 <= self.step <= MASK:
            raise ValueError(f"noise step is {self.step}: must be from 0 to {MASK}")

    def number(self) -> int:
        """The Philox key, a signed 64-bit number as `NoiseKeys` holds it."""
        text = f"{self.seed}/{self.picture}/{self.stream}/{self.request_id}"
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)


def stack_keys(keys: Sequence[NoiseKey], device: torch.device | str = "cpu") -> NoiseKeys:
    """The keys as the ops take them."""
    numbers = [[key.number(), key.step] for key in keys]
    pairs_K2 = torch.tensor(numbers, dtype=torch.int64).view(-1, 2).to(device)
    return NoiseKeys(pairs_K2[:, 0], pairs_K2[:, 1])


def normal(key: NoiseKey, shape: Sequence[int]) -> Tensor:
    """Standard normals, float32 of `shape`; elements are numbered row by row."""
    return normals([key], [math.prod(shape)])[0].view(*shape)


def normals(
    keys: Sequence[NoiseKey],
    lengths: Sequence[int],
    num_channels: int = 1,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """`normal` for many keys at once: float32 [lengths[i], num_channels] for each key."""
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    noise_LC = philox_normal(stack_keys(keys, device), offsets, sum(lengths), num_channels)
    return list(noise_LC.split(list(lengths)))


def token_uniforms(keys: Sequence[NoiseKey], count: int) -> Tensor:
    """The uniforms of the first tokens of each key's text: element 0 of each step. float32 [K, count]."""
    key_K = stack_keys(keys).key_B
    key_K2 = torch.stack((key_K & MASK, (key_K >> 32) & MASK), dim=1)
    counter_N4 = torch.zeros(len(keys) * count, 4, dtype=torch.int64)
    counter_N4[:, 1] = torch.arange(count).repeat(len(keys))
    word_N = philox(counter_N4, key_K2.repeat_interleave(count, dim=0))[:, 0]
    return ((word_N >> 8).to(torch.float32) * 2.0**-24).view(len(keys), count)
