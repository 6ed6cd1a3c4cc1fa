"""Draws the world's samples: text-to-image, in-context generation, editing; each a prompt with what it
allows.

A sample is a function of (seed, split, index). The target is drawn first; the instruction then names some of
what it shows and leaves the rest open; the references, the IC-CoT and the oracle's `Instruction` follow. So
the target is one of the valid answers, and the IC-CoT, which fixes all that was left open, is the one that
leads to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from realign.reasoning.schemas import ICCoT
from realign.world.instructions import Instruction, ObjectSpec, Relation
from realign.world.language import join_list, read_caption, write_caption
from realign.world.oracle import is_valid_reading
from realign.world.render import render, render_background_reference, render_object_reference
from realign.world.scene import (
    BACKGROUNDS,
    COLOURS,
    MAX_OBJECTS,
    NUM_CELLS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Object,
    Scene,
    holds,
    sample_scene,
)

TASKS = ("t2i", "in_context", "edit")


@dataclass(frozen=True)
class Reference:
    """A reference picture and what it shows: an object, a background's name, or the scene to edit."""

    picture: np.ndarray
    shows: Object | str | Scene


@dataclass(frozen=True)
class WorldSample:
    """One sample of the world.

    Attributes:
        task: 't2i', 'in_context' or 'edit'.
        text: the instruction; it points at the references as image 1, image 2, ..., in their order.
        references: the pictures that come before the text.
        instruction: what any answer must fulfil.
        iccot: the reasoning that leads to `target`.
        target: a valid answer.
    """

    task: str
    text: str
    references: tuple[Reference, ...]
    instruction: Instruction
    iccot: ICCoT
    target: Scene

    def render_target(self) -> np.ndarray:
        """uint8 [64, 64, 3]."""
        return render(self.target)


def sample(
    task: str, index: int, seed: int = 0, split: str = "train", num_scenes: int | None = None
) -> WorldSample:
    """Draws sample `index` of a task; equal arguments give equal samples.

    With `num_scenes`, pictures repeat after so many indexes (their latents can then be kept), and all that is
    said of them is drawn anew (of an edit, which is its picture's, it repeats too).

    Raises:
        ValueError: an unknown task or split.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    scene_index = index if num_scenes is None else index % num_scenes
    num_objects = 1 + scene_index % MAX_OBJECTS
    place = [seed, SPLITS.index(split)]
    if task == "edit":
        return _edit(np.random.default_rng([*place, TASKS.index(task), scene_index]), num_objects, split)
    target = _scene_of_split(np.random.default_rng([*place, len(TASKS), scene_index]), num_objects, split)
    draw = {"t2i": _text_to_image, "in_context": _in_context}[task]
    return draw(np.random.default_rng([*place, TASKS.index(task), index]), target)


def check_reasoning(iccot: ICCoT, drawn: WorldSample) -> None:
    """Checks that an IC-CoT is a valid reading of the sample's prompt.

    Raises:
        ValueError: the caption does not fix everything, contradicts the instruction, or a relation is wrong.
    """
    scene = read_caption(iccot.caption)
    if not is_valid_reading(scene, drawn.instruction):
        raise ValueError(f"the caption is not what the instruction asks for: {iccot.caption!r}")
    expected = len(drawn.references)
    if len(iccot.relations) != expected:
        raise ValueError(f"{len(iccot.relations)} relations for {expected} references")
    for number, (relation, reference) in enumerate(zip(iccot.relations, drawn.references, strict=True), 1):
        if relation.strip().lower() != _relation(reference, number):
            raise ValueError(f"relation {number} is wrong: {relation!r}")


def num_readings(instruction: Instruction, at_least: int) -> int:
    """How many captions an instruction admits (sizes and places left open), counted up to `at_least`."""
    count = 0
    options = [_candidates(spec) for spec in instruction.specs]
    for objects in product(*options):
        cells = {o.cell for o in objects}
        count += len(cells) == len(objects) and all(
            holds(r.relation, objects[r.subject].cell, objects[r.object].cell) for r in instruction.relations
        )
        if count >= at_least:
            break
    return count


def _candidates(spec: ObjectSpec) -> list[Object]:
    sizes = SIZES if spec.size is None else (spec.size,)
    return [Object(cell, spec.shape, spec.colour, size) for cell in sorted(spec.cells) for size in sizes]


def _relation(reference: Reference, number: int) -> str:
    shown = reference.shows
    if isinstance(shown, Object):
        return f"the {shown.name} is from image {number}."
    part = "background" if isinstance(shown, str) else "rest"
    return f"the {part} is from image {number}."


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]


def _scene_of_split(rng: np.random.Generator, num_objects: int, split: str) -> Scene:
    while (scene := sample_scene(rng, num_objects)).split != split:
        pass
    return scene


def _shuffled(rng: np.random.Generator, objects: tuple[Object, ...]) -> list[Object]:
    return [objects[i] for i in rng.permutation(len(objects))]


# -- how one wanted object is said ------------------------------------------------------------------


@dataclass
class _Wish:
    """A wanted object while its instruction is written: which of its attributes are named."""

    thing: Object
    size_named: bool
    place_named: bool
    reference: int | None = None
    place_text: str | None = field(default=None)

    def spec(self) -> ObjectSpec:
        size = self.thing.size if self.size_named else None
        spec = ObjectSpec(self.thing.shape, self.thing.colour, size)
        return replace(spec, cells=frozenset({self.thing.cell})) if self.place_named else spec

    def noun(self) -> str:
        if self.reference is not None:
            size = f" as a {self.thing.size} one" if self.size_named else ""
            return f"the object of image {self.reference}{size}"
        size = f"{self.thing.size} " if self.size_named else ""
        return f"a {size}{self.thing.name}"

    def phrase(self) -> str:
        return f"{self.noun()} at the {PLACES[self.thing.cell]}" if self.place_named else self.noun()


def _wishes(rng: np.random.Generator, order: list[Object], named: float) -> list[_Wish]:
    return [_Wish(o, bool(rng.random() < named), bool(rng.random() < named)) for o in order]


def _place_by_relation(rng: np.random.Generator, wishes: list[_Wish]) -> tuple[Relation, ...]:
    """Says where the first object is by the second, instead of naming their cells."""
    first, second = wishes[0], wishes[1]
    true = [r for r in RELATIONS if holds(r, first.thing.cell, second.thing.cell)]
    relation = _pick(rng, tuple(true))
    first.place_named = second.place_named = False
    return (Relation(0, relation, 1),)


def _phrases(wishes: list[_Wish], relations: tuple[Relation, ...]) -> str:
    if not relations:
        return join_list([w.phrase() for w in wishes])
    pair = f"{wishes[0].noun()} {relations[0].relation} {wishes[1].noun()}"
    return join_list([pair, *(w.phrase() for w in wishes[2:])])


# -- the three tasks ---------------------------------------------------------------------------------


def _text_to_image(rng: np.random.Generator, target: Scene) -> WorldSample:
    order = _shuffled(rng, target.objects)
    named = 1.0 if rng.random() < 0.5 else 0.7
    wishes = _wishes(rng, order, named)
    by_relation = named < 1.0 and len(order) > 1 and rng.random() < 0.3
    relations = _place_by_relation(rng, wishes) if by_relation else ()
    start = _pick(rng, ("", "draw ", "a picture of "))
    text = f"{start}{_phrases(wishes, relations)} on a {target.background} background"
    instruction = Instruction(target.background, tuple(w.spec() for w in wishes), relations)
    iccot = ICCoT(write_caption(order, target.background), ())
    return WorldSample("t2i", text, (), instruction, iccot, target)


def _in_context(rng: np.random.Generator, target: Scene) -> WorldSample:
    order = _shuffled(rng, target.objects)
    wishes = _wishes(rng, order, 0.5)
    references = []
    for position, wish in enumerate(wishes):
        if position == 0 or rng.random() < 0.75:
            references.append(Reference(render_object_reference(wish.thing), wish.thing))
            wish.reference = len(references)
    relations = _place_by_relation(rng, wishes) if len(order) > 1 and rng.random() < 0.6 else ()
    if rng.random() < 0.5:
        references.append(Reference(render_background_reference(target.background), target.background))
        ground = f"on the background of image {len(references)}"
    else:
        ground = f"on a {target.background} background"
    start = _pick(rng, ("put", "show", "draw"))
    text = f"{start} {_phrases(wishes, relations)} {ground}"
    instruction = Instruction(target.background, tuple(w.spec() for w in wishes), relations)
    return _with_reasoning("in_context", text, references, instruction, order, target)


def _with_reasoning(task, text, references, instruction, order, target) -> WorldSample:
    relations = tuple(_relation(r, n) for n, r in enumerate(references, 1))
    iccot = ICCoT(write_caption(order, target.background), relations)
    return WorldSample(task, text, tuple(references), instruction, iccot, target)


def _edit(rng: np.random.Generator, num_objects: int, split: str) -> WorldSample:
    operations = ("add", "replace", "recolour", "background") if num_objects > 1 else _SINGLE_EDITS
    operation = _pick(rng, operations)
    while True:
        source = _scene_of_split(rng, num_objects - (operation == "add"), split)
        drawn = _EDITS[operation](rng, source)
        if drawn.target.split == split:
            return drawn


def _edited(source: Scene, text: str, references: list[Reference], instruction: Instruction, target: Scene):
    references = [Reference(render(source), source), *references]
    return _with_reasoning("edit", text, references, instruction, list(target.objects), target)


def _kept(source: Scene, but: Object | None = None) -> tuple[ObjectSpec, ...]:
    return tuple(ObjectSpec.of(o, preserved=True) for o in source.objects if o != but)


def _new_object(rng: np.random.Generator, source: Scene, cell: int | None = None) -> Object:
    taken = {o.name for o in source.objects}
    free = [c for c in range(NUM_CELLS) if c not in {o.cell for o in source.objects}]
    while True:
        cell_drawn = int(rng.choice(free)) if cell is None else cell
        thing = Object(cell_drawn, _pick(rng, SHAPES), _pick(rng, COLOURS), _pick(rng, SIZES))
        if thing.name not in taken:
            return thing


def _refer_or_name(rng: np.random.Generator, wish: _Wish) -> list[Reference]:
    """Half the new objects come from a reference picture (image 2, after the picture to edit)."""
    if rng.random() < 0.5:
        return []
    wish.reference = 2
    return [Reference(render_object_reference(wish.thing), wish.thing)]


def _add(rng: np.random.Generator, source: Scene) -> WorldSample:
    thing = _new_object(rng, source)
    wish = _wishes(rng, [thing], 0.5)[0]
    references = _refer_or_name(rng, wish)
    specs, relations, where = (wish.spec(), *_kept(source)), (), ""
    if wish.place_named:
        where = f" at the {PLACES[thing.cell]}"
    elif rng.random() < 0.6:
        other = int(rng.integers(len(source.objects)))
        anchor = source.objects[other]
        relation = _pick(rng, tuple(r for r in RELATIONS if holds(r, thing.cell, anchor.cell)))
        relations, where = (Relation(0, relation, 1 + other),), f" {relation} the {anchor.name}"
    text = f"{_pick(rng, ('add', 'put'))} {wish.noun()}{where} in image 1"
    instruction = Instruction(source.background, specs, relations, source)
    return _edited(source, text, references, instruction, Scene(source.background, (*source.objects, thing)))


def _replace(rng: np.random.Generator, source: Scene) -> WorldSample:
    old = source.objects[rng.integers(len(source.objects))]
    thing = _new_object(rng, source, old.cell)
    wish = _Wish(thing, bool(rng.random() < 0.5), True)
    references = _refer_or_name(rng, wish)
    text = f"{_pick(rng, ('replace', 'swap'))} the {old.name} of image 1 with {wish.noun()}"
    instruction = Instruction(source.background, (wish.spec(), *_kept(source, old)), (), source)
    kept = tuple(o for o in source.objects if o != old)
    return _edited(source, text, references, instruction, Scene(source.background, (*kept, thing)))


def _recolour(rng: np.random.Generator, source: Scene) -> WorldSample:
    old = source.objects[rng.integers(len(source.objects))]
    taken = {o.name for o in source.objects}
    colours = tuple(c for c in COLOURS if f"{c} {old.shape}" not in taken)
    thing = replace(old, colour=_pick(rng, colours))
    text = f"{_pick(rng, ('make', 'paint', 'turn'))} the {old.name} of image 1 {thing.colour}"
    instruction = Instruction(source.background, (ObjectSpec.of(thing), *_kept(source, old)), (), source)
    kept = tuple(o for o in source.objects if o != old)
    return _edited(source, text, [], instruction, Scene(source.background, (*kept, thing)))


def _change_background(rng: np.random.Generator, source: Scene) -> WorldSample:
    new = _pick(rng, tuple(b for b in BACKGROUNDS if b != source.background))
    references, ground = [], f"a {new} background"
    if rng.random() < 0.5:
        references, ground = [Reference(render_background_reference(new), new)], "the background of image 2"
    text = (
        f"{_pick(rng, ('put image 1 on', 'change the background of image 1 to', 'move image 1 to'))} {ground}"
    )
    instruction = Instruction(new, _kept(source), (), source, changes_background=True)
    return _edited(source, text, references, instruction, Scene(new, source.objects))


_SINGLE_EDITS = ("replace", "recolour", "background")
_EDITS = {"add": _add, "replace": _replace, "recolour": _recolour, "background": _change_background}
