"""Draws the world: scenes at 64x64, reference pictures (one object, or a background alone) at 32x32.

Sprites are supersampled once and pasted at the centres of the nine cells, so drawing a scene is a few small
array products. Shapes keep their distance from one another in area and outline, colours from every
background.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from realign.world.scene import BACKGROUNDS, NUM_CELLS, Object, Scene

SIZE = 64
REFERENCE_SIZE = 32
CELL = 21  # pixels per side; cells are centred at 10, 32 and 53
CENTRES = (10, 32, 53)
RADII = {"small": 6.0, "large": 9.5}
REFERENCE_RADIUS = 12.0
REFERENCE_GROUND = 128.0
SUPERSAMPLING = 8

RGB = {
    "red": (222, 34, 38),
    "orange": (252, 142, 20),
    "yellow": (252, 228, 44),
    "green": (22, 150, 62),
    "blue": (32, 84, 226),
    "purple": (134, 44, 176),
    "pink": (255, 120, 196),
}
# top and bottom colour of each background, and the height at which a horizon lies (1: none)
GROUNDS = {
    "snow": ((214, 228, 240), (244, 248, 252), 0.35),
    "fog": ((176, 182, 186), (150, 156, 160), 1.0),
    "desert": ((236, 214, 178), (206, 170, 122), 0.4),
    "night": ((44, 48, 84), (68, 70, 100), 1.0),
    "meadow": ((196, 216, 214), (142, 180, 116), 0.45),
    "beach": ((120, 172, 190), (226, 210, 170), 0.55),
}


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Membership of points in the unit shape (y grows downwards, the shape fits [-1, 1]^2)."""
    radius = np.hypot(x, y)
    box = np.maximum(abs(x), abs(y))
    return {
        "circle": radius <= 0.98,
        "square": box <= 0.88,
        "triangle": (abs(x) <= (y + 1.0) * 0.55) & (y <= 0.85),
        "cross": (np.minimum(abs(x), abs(y)) <= 0.3) & (box <= 1.0),
        "ring": (radius <= 1.0) & (radius >= 0.55),
        "bar": (abs(x) <= 1.0) & (abs(y) <= 0.38),
    }[shape]


@cache
def sprite(shape: str, radius: float, side: int) -> np.ndarray:
    """Coverage of a shape centred in a side x side patch. Returns: float32 [side, side] in [0, 1]."""
    fine = (np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - side / 2
    mask = _inside(shape, fine[None, :] / radius, fine[:, None] / radius)
    return mask.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING).mean((1, 3)).astype(np.float32)


@cache
def background(name: str, side: int = SIZE) -> np.ndarray:
    """A background alone. Returns: float32 [side, side, 3] in [0, 255]."""
    top, bottom, horizon = GROUNDS[name]
    height = (np.arange(side, dtype=np.float32) + 0.5) / side
    if horizon < 1.0:
        mix = 1 / (1 + np.exp(-(height - horizon) * 24))
    else:
        mix = height
    column = np.outer(1 - mix, top) + np.outer(mix, bottom)
    return np.repeat(column[:, None, :], side, axis=1).astype(np.float32)


def cell_window(cell: int) -> tuple[slice, slice]:
    """The rows and columns of a cell's 21x21 pixels."""
    row, column = divmod(cell, 3)
    half = CELL // 2
    return tuple(slice(CENTRES[i] - half, CENTRES[i] + half + 1) for i in (row, column))


def _paste(ground: np.ndarray, colour: str, alpha: np.ndarray) -> np.ndarray:
    return ground + alpha[..., None] * (np.asarray(RGB[colour], np.float32) - ground)


def render(scene: Scene) -> np.ndarray:
    """Draws a scene. Returns: uint8 [64, 64, 3]."""
    picture = background(scene.background).copy()
    for thing in scene.objects:
        window = cell_window(thing.cell)
        picture[window] = _paste(picture[window], thing.colour, sprite(thing.shape, RADII[thing.size], CELL))
    return np.rint(picture).astype(np.uint8)


def render_object_reference(thing: Object) -> np.ndarray:
    """An object alone on grey, always of one size (that is the instruction's to say). uint8 [32, 32, 3]."""
    ground = np.full((REFERENCE_SIZE, REFERENCE_SIZE, 3), REFERENCE_GROUND, np.float32)
    picture = _paste(ground, thing.colour, sprite(thing.shape, REFERENCE_RADIUS, REFERENCE_SIZE))
    return np.rint(picture).astype(np.uint8)


def render_background_reference(name: str) -> np.ndarray:
    """A background alone. uint8 [32, 32, 3]."""
    return np.rint(background(name, REFERENCE_SIZE)).astype(np.uint8)


@dataclass(frozen=True)
class Reference:
    """A reference picture, uint8 [H, W, 3], and what it shows: an object, a background's name, or a scene."""

    picture: np.ndarray
    shows: Object | str | Scene

    @classmethod
    def of_object(cls, thing: Object) -> Reference:
        """An object alone."""
        return cls(render_object_reference(thing), thing)

    @classmethod
    def of_background(cls, name: str) -> Reference:
        """A background alone."""
        return cls(render_background_reference(name), name)

    @classmethod
    def of_scene(cls, scene: Scene) -> Reference:
        """A whole picture, to edit."""
        return cls(render(scene), scene)


@cache
def cell_grounds() -> np.ndarray:
    """Every background cut into its cells. Returns: float32 [backgrounds, cells, 21, 21, 3]."""
    return np.stack([[background(b)[cell_window(c)] for c in range(NUM_CELLS)] for b in BACKGROUNDS])
