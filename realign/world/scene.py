"""What a scene of the procedural world is: a background and one to three objects on a 3x3 grid of places.

A picture is a function of its scene alone, so a scene can be named, hashed, assigned to a split, written as a
caption and read back from pixels without loss. The split of a scene is a function of the scene (not of the
random stream that drew it): training, validation and test never share one, by construction.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
SIZES = ("small", "large")
BACKGROUNDS = ("snow", "fog", "desert", "night", "meadow", "beach")
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
NUM_CELLS = len(PLACES)
ALL_CELLS = frozenset(range(NUM_CELLS))
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "val", "test")
MAX_OBJECTS = 3


@dataclass(frozen=True, order=True)
class Object:
    """One object: the cell is its place, 0 to 8 in reading order."""

    cell: int
    shape: str
    colour: str
    size: str

    @property
    def name(self) -> str:
        """How a text points at it: colour and shape, unique within a scene."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background and its objects, kept in reading order of their cells."""

    background: str
    objects: tuple[Object, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "objects", tuple(sorted(self.objects)))

    @cached_property
    def key(self) -> str:
        """Canonical name: equal for equal pictures."""
        parts = (f"{o.cell}:{o.size}:{o.colour}:{o.shape}" for o in self.objects)
        return f"{self.background}|{'|'.join(parts)}"

    @cached_property
    def split(self) -> str:
        """'train' (8 of 10 scenes), 'val' or 'test', by a hash of the scene itself."""
        bucket = hashlib.blake2b(self.key.encode(), digest_size=2, person=b"realign-split").digest()
        tenth = int.from_bytes(bucket, "little") % 10
        return "train" if tenth < 8 else SPLITS[tenth - 7]


def holds(relation: str, cell: int, other: int) -> bool:
    """Whether an object in `cell` is left of, right of, above or below one in `other`."""
    row, column = divmod(cell, 3)
    other_row, other_column = divmod(other, 3)
    return {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


def sample_scene(rng: np.random.Generator, num_objects: int) -> Scene:
    """A uniformly drawn scene with `num_objects` objects whose names (colour and shape) all differ."""
    names = rng.choice(len(SHAPES) * len(COLOURS), size=num_objects, replace=False)
    cells = rng.choice(NUM_CELLS, size=num_objects, replace=False)
    sizes = rng.integers(len(SIZES), size=num_objects)
    objects = tuple(
        Object(int(c), SHAPES[n % len(SHAPES)], COLOURS[n // len(SHAPES)], SIZES[s])
        for c, n, s in zip(cells, names, sizes, strict=True)
    )
    return Scene(BACKGROUNDS[rng.integers(len(BACKGROUNDS))], objects)
