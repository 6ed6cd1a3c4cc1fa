"""How an instruction says which objects it wants: what it names of each, and what it leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from realign.world.instructions import ObjectSpec, Relation
from realign.world.language import join_list
from realign.world.scene import ALL_CELLS, PLACES, RELATIONS, Object, holds


@dataclass
class Wish:
    """A wanted object while its instruction is written.

    Attributes:
        thing: the object of the target.
        size_named, place_named: whether the instruction says its size and its place.
        reference: the number of the picture that shows it, from 1; None: the text names it.
    """

    thing: Object
    size_named: bool
    place_named: bool
    reference: int | None = None

    def spec(self) -> ObjectSpec:
        """What the instruction asks for."""
        size = self.thing.size if self.size_named else None
        cells = frozenset({self.thing.cell}) if self.place_named else ALL_CELLS
        return ObjectSpec(self.thing.shape, self.thing.colour, size, cells)

    def noun(self) -> str:
        """The object without its place."""
        if self.reference is not None:
            size = f" as a {self.thing.size} one" if self.size_named else ""
            return f"the object of image {self.reference}{size}"
        named = f"{self.thing.size} {self.thing.name}" if self.size_named else self.thing.name
        return f"{'an' if named.startswith('o') else 'a'} {named}"

    def phrase(self) -> str:
        """The object, and its place if that is named."""
        return f"{self.noun()} at the {PLACES[self.thing.cell]}" if self.place_named else self.noun()


def draw_wishes(rng: np.random.Generator, order: Sequence[Object], named: float) -> list[Wish]:
    """Each size and each place is named with probability `named`."""
    return [Wish(o, bool(rng.random() < named), bool(rng.random() < named)) for o in order]


def place_by_relation(rng: np.random.Generator, wishes: list[Wish]) -> tuple[Relation, ...]:
    """Says where the first object is by the second, instead of naming their cells."""
    first, second = wishes[0], wishes[1]
    relation = pick_relation(rng, first.thing, second.thing)
    first.place_named = second.place_named = False
    return (Relation(0, relation, 1),)


def pick_relation(rng: np.random.Generator, thing: Object, anchor: Object) -> str:
    """One of the relations in which `thing` stands to `anchor`."""
    return pick(rng, [r for r in RELATIONS if holds(r, thing.cell, anchor.cell)])


def join_phrases(wishes: Sequence[Wish], relations: tuple[Relation, ...]) -> str:
    """All wanted objects; the first two by their relation, where there is one."""
    if not relations:
        return join_list([w.phrase() for w in wishes])
    pair = f"{wishes[0].noun()} {relations[0].relation} {wishes[1].noun()}"
    return join_list([pair, *(w.phrase() for w in wishes[2:])])


def pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    """One of the choices, all equally likely."""
    return choices[rng.integers(len(choices))]
