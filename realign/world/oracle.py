"""Reads a 64x64 picture of the world back into a scene, exactly, and judges it.

Every cell is compared with everything that could stand in it (nothing, or one of the 84 sprites) on each of
the six backgrounds; the background is the one that explains the whole picture best. A cell that its best
explanation misses by too much is unclear, and a picture with an unclear cell is never all-right: noise, blur,
half a shape or a shape between two places is an error, not a near miss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

from realign.world.instructions import Instruction, ObjectSpec, Relation
from realign.world.render import CELL, RADII, RGB, SIZE, cell_grounds, cell_window, sprite
from realign.world.scene import BACKGROUNDS, COLOURS, NUM_CELLS, SHAPES, SIZES, Object, Scene, holds

MAX_RESIDUAL = 0.11  # of a cell with an object: root mean square, of a [0, 1] range
MAX_EMPTY_RESIDUAL = 0.07  # of a cell without one
MIN_EXPLAINED = 0.5  # share of what sets a cell apart from its background that its object must explain
EMPTY = 0
CANDIDATES = tuple((s, c, z) for s in SHAPES for c in COLOURS for z in SIZES)
NUM_CHOICES = 1 + len(CANDIDATES)  # of a cell: nothing, or a sprite
READ_BATCH = 256  # pictures; their differences to all templates are held in memory at once

Assignment = tuple[Object | None, ...]  # the object taken for each wanted one


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Attributes:
        scene: the background and every object that was recognised (0 to 9 of them).
        unclear: the cells that nothing explains.
        residual: the worst root-mean-square difference over the cells, of a [0, 1] range.
    """

    scene: Scene
    unclear: tuple[int, ...]
    residual: float


@dataclass(frozen=True)
class Verdict:
    """A picture against an instruction (or a caption).

    Attributes:
        objects: share of the wanted objects that are there with every wanted attribute.
        colours: share of the wanted objects whose colour is right in the best assignment.
        count: whether there are as many objects as wanted.
        relations: whether every wanted relation holds.
        background: whether the background is the wanted one.
        preserved: whether what must stay stayed; None where nothing must.
        all_right: everything, with no cell unclear.
    """

    objects: float
    colours: float
    count: bool
    relations: bool
    background: bool
    preserved: bool | None
    all_right: bool

    @property
    def parts(self) -> tuple[float, ...]:
        """What was asked for, each 0 to 1: objects, their number, relations, background."""
        return self.objects, float(self.count), float(self.relations), float(self.background)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """All that may fill each cell.

    Returns: float32 [cells, backgrounds * choices, pixels] in [0, 1], and their squared norms.
    """
    grounds = cell_grounds()[:, :, None]  # [backgrounds, cells, 1, 21, 21, 3]
    alpha = np.stack([sprite(s, RADII[z], CELL) for s, _, z in CANDIDATES])[None, None, ..., None]
    paint = np.asarray([RGB[c] for _, c, _ in CANDIDATES], np.float32)[None, None, :, None, None, :]
    filled = np.concatenate([grounds, grounds + alpha * (paint - grounds)], axis=2)
    by_cell = np.rint(filled).swapaxes(0, 1).reshape(NUM_CELLS, len(BACKGROUNDS) * NUM_CHOICES, -1)
    flat = np.ascontiguousarray(by_cell / 255, np.float32)
    return flat, (flat**2).sum(-1)


def read_pictures(pictures: Sequence[np.ndarray] | np.ndarray) -> list[Reading]:
    """Reads pictures.

    Args:
        pictures: uint8 [N, 64, 64, 3] (or a list of [64, 64, 3]).

    Returns: one Reading a picture.

    Raises:
        ValueError: pictures of another size or type.
    """
    batch = np.asarray(pictures)
    if batch.size == 0:
        return []
    if batch.dtype != np.uint8 or batch.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(
            f"the oracle reads uint8 pictures of [N, 64, 64, 3], not {batch.dtype} {batch.shape}"
        )
    starts = range(0, len(batch), READ_BATCH)
    return [reading for start in starts for reading in _read(batch[start : start + READ_BATCH])]


def _read(batch: np.ndarray) -> list[Reading]:
    templates, norms = _templates()
    cells = np.stack([batch[:, *cell_window(c)].reshape(len(batch), -1) for c in range(NUM_CELLS)])
    cells = cells.astype(np.float32) / 255
    squared = (cells**2).sum(-1)[..., None] - 2 * cells @ templates.transpose(0, 2, 1) + norms[:, None, :]
    squared = squared.reshape(NUM_CELLS, len(batch), len(BACKGROUNDS), NUM_CHOICES)
    ground = squared.min(-1).sum(0).argmin(-1)  # [N]
    chosen = np.take_along_axis(squared, ground[None, :, None, None], axis=2)[:, :, 0]  # [cells, N, choices]
    best = chosen.argmin(-1)
    pixels = templates.shape[-1]
    squared_best = np.maximum(chosen.min(-1), 0)
    residual = np.sqrt(squared_best / pixels)
    is_empty = best == EMPTY
    explained = 1 - squared_best / np.maximum(chosen[..., EMPTY], 1e-6)
    unclear = np.where(
        is_empty, residual > MAX_EMPTY_RESIDUAL, (residual > MAX_RESIDUAL) | (explained < MIN_EXPLAINED)
    )
    return [
        Reading(
            Scene(BACKGROUNDS[ground[i]], _objects(best[:, i], ~is_empty[:, i] & ~unclear[:, i])),
            tuple(int(c) for c in np.flatnonzero(unclear[:, i])),
            float(residual[:, i].max()),
        )
        for i in range(len(batch))
    ]


def _objects(best: np.ndarray, is_there: np.ndarray) -> tuple[Object, ...]:
    return tuple(Object(int(cell), *CANDIDATES[best[cell] - 1]) for cell in np.flatnonzero(is_there))


def judge(reading: Reading, instruction: Instruction) -> Verdict:
    """Whether a picture is what the instruction asks for (any of its valid readings)."""
    scene, specs = reading.scene, instruction.specs
    best = max(_assignments(scene.objects, specs), key=lambda found: _agreement(found, instruction))
    pairs = list(zip(best, specs, strict=True))
    matched = [o is not None and s.admits(o) for o, s in pairs]
    coloured = [o is not None and s.colour in (None, o.colour) for o, s in pairs]
    relations = all(_is_related(best, relation) for relation in instruction.relations)
    count = len(scene.objects) + len(reading.unclear) == len(specs)
    background = scene.background == instruction.background
    preserved = None
    if instruction.source is not None:
        kept = all(m for m, s in zip(matched, specs, strict=True) if s.preserved)
        preserved = kept and (background or instruction.changes_background) and count
    right = all(matched) and relations and count and background and not reading.unclear
    return Verdict(_share(matched), _share(coloured), count, relations, background, preserved, right)


def judge_caption(reading: Reading, caption: Scene) -> Verdict:
    """Whether a picture is what a caption (a fully specified scene) says."""
    return judge(reading, Instruction.exactly(caption))


def is_valid_reading(scene: Scene, instruction: Instruction) -> bool:
    """Whether a scene (of a reasoning's caption, say) does all that the instruction asks for."""
    return judge(Reading(scene, (), 0.0), instruction).all_right


def _assignments(objects: tuple[Object, ...], specs: tuple[ObjectSpec, ...]) -> Iterator[Assignment]:
    """Every way to take the objects for the wanted ones; where objects are too few, None for the rest."""
    padded = (*objects, *([None] * max(0, len(specs) - len(objects))))
    return permutations(padded, len(specs))


def _agreement(found: Assignment, instruction: Instruction) -> tuple[int, int, int]:
    """How well an assignment does: wanted objects, then relations, then single attributes."""
    pairs = list(zip(found, instruction.specs, strict=True))
    full = sum(o is not None and s.admits(o) for o, s in pairs)
    related = sum(_is_related(found, relation) for relation in instruction.relations)
    partly = sum(s.likeness(o) for o, s in pairs if o is not None)
    return full, related, partly


def _is_related(found: Assignment, relation: Relation) -> bool:
    subject, other = found[relation.subject], found[relation.object]
    return subject is not None and other is not None and holds(relation.relation, subject.cell, other.cell)


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
