"""Scenes that differ from a given one in a single thing: what a reward must tell apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from realign.world.scene import BACKGROUNDS, COLOURS, NUM_CELLS, SHAPES, SIZES, Object, Scene
from realign.world.wishes import pick

ATTRIBUTES = ("shape", "colour", "size", "place", "background")
OTHER_ERRORS = ("missing", "extra", "swap")
KINDS = (*ATTRIBUTES, *OTHER_ERRORS)


def draw_variant(rng: np.random.Generator, scene: Scene, kind: str) -> Scene | None:
    """A scene with one thing wrong; None where this scene cannot have that error.

    Args:
        kind: an object's "shape", "colour", "size" or "place"; the "background"; an object "missing" or one
            "extra"; "swap": two objects have each other's colours.
    """
    if kind == "background":
        return replace(scene, background=_another(rng, BACKGROUNDS, scene.background))
    objects = list(scene.objects)
    number = int(rng.integers(len(objects)))
    if kind == "missing":
        objects.pop(number)
    elif kind == "extra":
        thing = Object(_free_cell(rng, scene), pick(rng, SHAPES), pick(rng, COLOURS), pick(rng, SIZES))
        objects.append(thing)
    elif kind == "swap":
        if len(objects) < 2:
            return None
        other = (number + int(rng.integers(1, len(objects)))) % len(objects)
        first, second = objects[number].colour, objects[other].colour
        objects[number] = replace(objects[number], colour=second)
        objects[other] = replace(objects[other], colour=first)
    else:
        objects[number] = _change(rng, scene, objects[number], kind)
    changed = Scene(scene.background, tuple(objects))
    has_names_apart = len({o.name for o in objects}) == len(objects)
    return changed if objects and has_names_apart and changed != scene else None


def _change(rng: np.random.Generator, scene: Scene, thing: Object, kind: str) -> Object:
    if kind == "place":
        return replace(thing, cell=_free_cell(rng, scene))
    choices = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[kind]
    return replace(thing, **{kind: _another(rng, choices, getattr(thing, kind))})


def _free_cell(rng: np.random.Generator, scene: Scene) -> int:
    taken = {o.cell for o in scene.objects}
    return int(rng.choice([cell for cell in range(NUM_CELLS) if cell not in taken]))


def _another(rng: np.random.Generator, choices: tuple[str, ...], but: str) -> str:
    return pick(rng, [choice for choice in choices if choice != but])
