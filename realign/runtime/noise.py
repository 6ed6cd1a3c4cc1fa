"""Every random number of generation, as a pure function of what it is for.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), which
turns a counter of four 32-bit words and a key of two into four random words. Kernels reproduce this module;
the layout is:

- key: the first 8 bytes of BLAKE2b (`digest_size=8`) of the UTF-8 text
  `"{seed}/{picture}/{stream}/{request_id}"`, read as a little-endian 64-bit number; its low word is key word
  0, its high word key word 1.
- counter: word 0 is the block number, word 1 the step, words 2 and 3 are 0. Element `e` is lane `e % 4` of
  block `e // 4`.
- uniform: `(word >> 8) * 2**-24`, in [0, 1), exact in float32.
- normal (Box-Muller, float32): lanes (0, 1) and (2, 3) are pairs. With `u = ((word_0 >> 8) + 1) * 2**-24` in
  (0, 1] and `w = (word_1 >> 8) * 2**-24`, the pair is
  `sqrt(-2 ln u) * cos(2 pi w)` and `sqrt(-2 ln u) * sin(2 pi w)`.

So a sample's noise depends on its request alone, never on its batch, its place in it, or what was drawn
before. K keys, N elements of one key, B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

STREAMS = ("initial", "sde", "text")
NUM_ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


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

    def words(self) -> tuple[int, int]:
        """The two 32-bit words of the Philox key."""
        text = f"{self.seed}/{self.picture}/{self.stream}/{self.request_id}"
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        return number & MASK, number >> 32


def normal(key: NoiseKey, shape: Sequence[int]) -> Tensor:
    """Standard normals, float32 of `shape`; elements are numbered row by row."""
    return normals([key], [math.prod(shape)])[0].view(*shape)


def normals(keys: Sequence[NoiseKey], sizes: Sequence[int]) -> list[Tensor]:
    """`normal` for many keys at once: float32 [sizes[i]] for each key."""
    words_B4 = _draw(keys, sizes)
    radius_B2 = torch.sqrt(-2.0 * torch.log(_to_unit(words_B4[:, 0::2], 1)))
    angle_B2 = (2.0 * math.pi) * _to_unit(words_B4[:, 1::2], 0)
    pairs_B22 = torch.stack((radius_B2 * torch.cos(angle_B2), radius_B2 * torch.sin(angle_B2)), dim=2)
    blocks = pairs_B22.view(-1, 4).split([_num_blocks(size) for size in sizes])
    return [block_B4.flatten()[:size] for block_B4, size in zip(blocks, sizes, strict=True)]


def token_uniforms(keys: Sequence[NoiseKey], step: int) -> Tensor:
    """The uniform of token `step` of each key's text: element 0 of that step. float32 [K]."""
    counter_K4 = torch.zeros(len(keys), 4, dtype=torch.int64)
    counter_K4[:, 1] = step
    return _to_unit(philox(counter_K4, _key_words(keys))[:, 0], 0)


def philox(counter_B4: Tensor, key_B2: Tensor) -> Tensor:
    """Philox4x32-10: counters [B, 4] and keys [B, 2] to random words [B, 4]; 32-bit words in int64."""
    c0, c1, c2, c3 = counter_B4.unbind(1)
    k0, k1 = key_B2.unbind(1)
    for _ in range(NUM_ROUNDS):
        # A product of two 32-bit words wraps to a signed 64-bit one; shift and mask still give its two words.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return torch.stack((c0, c1, c2, c3), dim=1)


def _draw(keys: Sequence[NoiseKey], sizes: Sequence[int]) -> Tensor:
    """The words of every block of every key, one key after another. int64 [B, 4]."""
    num_blocks = torch.tensor([_num_blocks(size) for size in sizes])
    starts = num_blocks.cumsum(0) - num_blocks
    block_B = torch.arange(int(num_blocks.sum())) - starts.repeat_interleave(num_blocks)
    step_B = torch.tensor([key.step for key in keys]).repeat_interleave(num_blocks)
    zero_B = torch.zeros_like(block_B)
    key_B2 = _key_words(keys).repeat_interleave(num_blocks, dim=0)
    return philox(torch.stack((block_B, step_B, zero_B, zero_B), dim=1), key_B2)


def _key_words(keys: Sequence[NoiseKey]) -> Tensor:
    return torch.tensor([key.words() for key in keys], dtype=torch.int64).view(-1, 2)


def _num_blocks(size: int) -> int:
    return -(-size // 4)


def _to_unit(words: Tensor, offset: int) -> Tensor:
    """The upper 24 bits plus `offset`, over 2**24: exact in float32."""
    return ((words >> 8) + offset).to(torch.float32) * 2.0**-24
