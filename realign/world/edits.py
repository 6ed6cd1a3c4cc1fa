"""The four edits of a picture: what is said, what it asks for, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from realign.world.instructions import Instruction, ObjectSpec, Relation
from realign.world.render import Reference
from realign.world.scene import BACKGROUNDS, COLOURS, NUM_CELLS, PLACES, SHAPES, SIZES, Object, Scene
from realign.world.wishes import Wish, draw_wishes, pick, pick_relation

OPERATIONS = ("add", "replace", "recolour", "background")


@dataclass(frozen=True)
class Edit:
    """What is said, the references after the picture to edit, what is asked for, and what comes of it."""

    text: str
    references: tuple[Reference, ...]
    instruction: Instruction
    target: Scene


def draw_edit(rng: np.random.Generator, operation: str, source: Scene) -> Edit:
    """Draws an edit of `source`; `operation` is one of `OPERATIONS`."""
    draw = {"add": _add, "replace": _replace, "recolour": _recolour, "background": _change_background}
    return draw[operation](rng, source)


def _add(rng: np.random.Generator, source: Scene) -> Edit:
    thing = _new_object(rng, source)
    wish = draw_wishes(rng, [thing], 0.5)[0]
    references = _refer_or_name(rng, wish)
    relations, where = (), ""
    if wish.place_named:
        where = f" at the {PLACES[thing.cell]}"
    elif rng.random() < 0.6:
        other = int(rng.integers(len(source.objects)))
        relation = pick_relation(rng, thing, source.objects[other])
        relations = (Relation(0, relation, 1 + other),)
        where = f" {relation} the {source.objects[other].name}"
    text = f"{pick(rng, ('add', 'put'))} {wish.noun()}{where} in image 1"
    specs = (wish.spec(), *_kept(source))
    instruction = Instruction(source.background, specs, relations, source)
    return Edit(text, references, instruction, replace(source, objects=(*source.objects, thing)))


def _replace(rng: np.random.Generator, source: Scene) -> Edit:
    old = _pick_object(rng, source)
    thing = _new_object(rng, source, old.cell)
    wish = Wish(thing, size_named=bool(rng.random() < 0.5), place_named=True)
    references = _refer_or_name(rng, wish)
    text = f"{pick(rng, ('replace', 'swap'))} the {old.name} of image 1 with {wish.noun()}"
    instruction = Instruction(source.background, (wish.spec(), *_kept(source, old)), (), source)
    return Edit(text, references, instruction, _exchange(source, old, thing))


def _recolour(rng: np.random.Generator, source: Scene) -> Edit:
    old = _pick_object(rng, source)
    taken = {o.name for o in source.objects}
    thing = replace(old, colour=pick(rng, [c for c in COLOURS if f"{c} {old.shape}" not in taken]))
    text = f"{pick(rng, ('make', 'paint', 'turn'))} the {old.name} of image 1 {thing.colour}"
    instruction = Instruction(source.background, (ObjectSpec.of(thing), *_kept(source, old)), (), source)
    return Edit(text, (), instruction, _exchange(source, old, thing))


def _change_background(rng: np.random.Generator, source: Scene) -> Edit:
    new = pick(rng, [b for b in BACKGROUNDS if b != source.background])
    references, ground = (), f"a {new} background"
    if rng.random() < 0.5:
        references, ground = (Reference.of_background(new),), "the background of image 2"
    start = pick(rng, ("put image 1 on", "change the background of image 1 to", "move image 1 to"))
    instruction = Instruction(new, _kept(source), (), source, changes_background=True)
    return Edit(f"{start} {ground}", references, instruction, replace(source, background=new))


def _refer_or_name(rng: np.random.Generator, wish: Wish) -> tuple[Reference, ...]:
    """Half the new objects come from a reference picture (image 2, after the picture to edit)."""
    if rng.random() < 0.5:
        return ()
    wish.reference = 2
    return (Reference.of_object(wish.thing),)


def _pick_object(rng: np.random.Generator, scene: Scene) -> Object:
    return scene.objects[rng.integers(len(scene.objects))]


def _new_object(rng: np.random.Generator, source: Scene, cell: int | None = None) -> Object:
    """An object of a new name, in `cell` or in a free one."""
    taken = {o.name for o in source.objects}
    free = [c for c in range(NUM_CELLS) if c not in {o.cell for o in source.objects}]
    while True:
        place = int(rng.choice(free)) if cell is None else cell
        thing = Object(place, pick(rng, SHAPES), pick(rng, COLOURS), pick(rng, SIZES))
        if thing.name not in taken:
            return thing


def _exchange(source: Scene, old: Object, new: Object) -> Scene:
    return replace(source, objects=(*(o for o in source.objects if o != old), new))


def _kept(source: Scene, but: Object | None = None) -> tuple[ObjectSpec, ...]:
    """What must stay as it is: all objects of the picture, `but` one."""
    return tuple(ObjectSpec.of(o, preserved=True) for o in source.objects if o != but)
