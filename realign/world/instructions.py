"""What an instruction asks for: wanted objects, their attributes fixed or left open, and relations."""

from __future__ import annotations

from dataclasses import dataclass

from realign.world.scene import ALL_CELLS, Object, Scene


@dataclass(frozen=True)
class ObjectSpec:
    """A wanted object; None (or several cells) is a choice left open.

    Attributes:
        shape, colour, size: wanted attributes, None where any will do.
        cells: the places it may stand in.
        preserved: it stood in the picture to edit and must stay as it was.
    """

    shape: str | None
    colour: str | None
    size: str | None = None
    cells: frozenset[int] = ALL_CELLS
    preserved: bool = False

    def admits(self, thing: Object) -> bool:
        """Whether an object is what is wanted."""
        return all(self._fits(thing))

    def likeness(self, thing: Object) -> int:
        """How many of the four (shape, colour, size, cell) fit."""
        return sum(self._fits(thing))

    def _fits(self, thing: Object) -> tuple[bool, ...]:
        return (
            self.shape in (None, thing.shape),
            self.colour in (None, thing.colour),
            self.size in (None, thing.size),
            thing.cell in self.cells,
        )

    @classmethod
    def of(cls, thing: Object, preserved: bool = False) -> ObjectSpec:
        """The spec that only this object fulfils."""
        return cls(thing.shape, thing.colour, thing.size, frozenset({thing.cell}), preserved)


@dataclass(frozen=True)
class Relation:
    """specs[subject] stands `relation` (left of, right of, above, below) specs[object]."""

    subject: int
    relation: str
    object: int


@dataclass(frozen=True)
class Instruction:
    """All that a picture must fulfil.

    Attributes:
        background: the wanted background.
        specs: the wanted objects, all of them: another object in the picture is an error.
        relations: between specs, by index.
        source: the picture to edit, if it is an edit.
        changes_background: the edit asks for another background.
    """

    background: str
    specs: tuple[ObjectSpec, ...]
    relations: tuple[Relation, ...] = ()
    source: Scene | None = None
    changes_background: bool = False

    @classmethod
    def exactly(cls, scene: Scene) -> Instruction:
        """The instruction that only this scene fulfils."""
        return cls(scene.background, tuple(ObjectSpec.of(o) for o in scene.objects))
