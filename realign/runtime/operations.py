"""What a program asks of the engine, and gets.

A program says what a request reads and writes, in what order: a generator that yields operations (`Read`,
`Write`, `Draw`), gets their results, and returns the sample.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from realign.runtime.guidance import Branch
from realign.runtime.kv import Context
from realign.runtime.noise import NoiseKey
from realign.runtime.reader import Reading
from realign.runtime.recording import Recording
from realign.runtime.request import Request, Sample, as_image


@dataclass(frozen=True, eq=False)
class Read:
    """Gives a list of contexts, one for each reading. Readings that begin alike share what they share."""

    readings: tuple[Reading, ...]


@dataclass(frozen=True, eq=False)
class Write:
    """Gives a `Written` that has read the whole turn; `turn` numbers a request's texts, for their noise."""

    context: Context
    turn: int = 0


@dataclass(frozen=True, eq=False)
class Draw:
    """Gives a `Drawn`; `picture` numbers a request's pictures, for their noise.

    `noise_LC` is initial noise to take instead, float32 [tokens, C]; `replayed` the latents before each step.
    """

    branches: tuple[Branch, ...]
    picture: int = 0
    noise_LC: Tensor | None = None
    replayed: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture as `Sample` has it, and as in `Trajectory` how it came about."""

    picture: Image.Image | Tensor
    noise_key: NoiseKey
    latent_LC: Tensor
    steps: tuple[Tensor, ...]
    recording: Recording | None = None

    @property
    def image(self) -> Image.Image:
        """The picture as PIL, for programs that read what they have drawn."""
        return as_image(self.picture)


Operation = Read | Write | Draw
Program = Callable[[Request], Generator[Operation, Any, Sample]]
