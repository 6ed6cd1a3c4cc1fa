"""Draws the world's samples: text-to-image, in-context generation, editing; each a prompt with what it
allows.

A sample is a function of (seed, split, index). The target is drawn first; the instruction then names some of
what it shows and leaves the rest open; the references, the IC-CoT and the oracle's `Instruction` follow. So
the target is one of the valid answers, and the IC-CoT, which fixes all that was left open, is the one that
leads to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from realign.reasoning.schemas import ICCoT
from realign.world.edits import OPERATIONS, draw_edit
from realign.world.instructions import Instruction, ObjectSpec
from realign.world.language import read_caption, write_caption
from realign.world.oracle import is_valid_reading
from realign.world.render import Reference, render
from realign.world.scene import MAX_OBJECTS, SIZES, SPLITS, Object, Scene, holds, sample_scene
from realign.world.wishes import draw_wishes, join_phrases, pick, place_by_relation

TASKS = ("t2i", "in_context", "edit")


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


def _text_to_image(rng: np.random.Generator, target: Scene) -> WorldSample:
    order = _shuffled(rng, target.objects)
    named = 1.0 if rng.random() < 0.5 else 0.7
    wishes = draw_wishes(rng, order, named)
    by_relation = named < 1.0 and len(order) > 1 and rng.random() < 0.3
    relations = place_by_relation(rng, wishes) if by_relation else ()
    start = pick(rng, ("", "draw ", "a picture of "))
    text = f"{start}{join_phrases(wishes, relations)} on a {target.background} background"
    instruction = Instruction(target.background, tuple(w.spec() for w in wishes), relations)
    return WorldSample("t2i", text, (), instruction, _reason((), order, target.background), target)


def _in_context(rng: np.random.Generator, target: Scene) -> WorldSample:
    order = _shuffled(rng, target.objects)
    wishes = draw_wishes(rng, order, 0.5)
    references: list[Reference] = []
    for position, wish in enumerate(wishes):
        if position == 0 or rng.random() < 0.75:
            references.append(Reference.of_object(wish.thing))
            wish.reference = len(references)
    relations = place_by_relation(rng, wishes) if len(order) > 1 and rng.random() < 0.6 else ()
    ground = f"on a {target.background} background"
    if rng.random() < 0.5:
        references.append(Reference.of_background(target.background))
        ground = f"on the background of image {len(references)}"
    start = pick(rng, ("put", "show", "draw"))
    text = f"{start} {join_phrases(wishes, relations)} {ground}"
    instruction = Instruction(target.background, tuple(w.spec() for w in wishes), relations)
    iccot = _reason(references, order, target.background)
    return WorldSample("in_context", text, tuple(references), instruction, iccot, target)


def _edit(rng: np.random.Generator, num_objects: int, split: str) -> WorldSample:
    """An edit whose pictures, before and after, are both of the split; the target has `num_objects`."""
    # Nothing can be added to reach a single object: a picture to edit is never empty.
    operation = pick(rng, OPERATIONS if num_objects > 1 else [o for o in OPERATIONS if o != "add"])
    while True:
        source = _scene_of_split(rng, num_objects - (operation == "add"), split)
        edit = draw_edit(rng, operation, source)
        if edit.target.split == split:
            break
    references = (Reference.of_scene(source), *edit.references)
    iccot = _reason(references, edit.target.objects, edit.target.background)
    return WorldSample("edit", edit.text, references, edit.instruction, iccot, edit.target)


def _scene_of_split(rng: np.random.Generator, num_objects: int, split: str) -> Scene:
    while (scene := sample_scene(rng, num_objects)).split != split:
        pass
    return scene


def _shuffled(rng: np.random.Generator, objects: tuple[Object, ...]) -> list[Object]:
    return [objects[i] for i in rng.permutation(len(objects))]


def _reason(references: Sequence[Reference], order: Sequence[Object], background: str) -> ICCoT:
    """The IC-CoT of a target, its objects named in the given order."""
    relations = tuple(_relation(reference, number) for number, reference in enumerate(references, 1))
    return ICCoT(write_caption(order, background), relations)


def _relation(reference: Reference, number: int) -> str:
    shown = reference.shows
    if isinstance(shown, Object):
        return f"the {shown.name} is from image {number}."
    part = "background" if isinstance(shown, str) else "rest"
    return f"the {part} is from image {number}."
