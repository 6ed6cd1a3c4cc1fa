"""The world's English: captions that name everything, and their reading back into scenes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from realign.world.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Object, Scene

_OBJECT = re.compile(
    rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) (?:at|in) the "
    rf"({'|'.join(sorted(PLACES, key=len, reverse=True))})\b"
)
_BACKGROUND = re.compile(rf"\bon (?:a |the )?({'|'.join(BACKGROUNDS)})\b")
_LEFT_OVER = re.compile(r"\b(?!a\b|an\b|and\b|background\b)[a-z]+\b")


def join_list(parts: Sequence[str]) -> str:
    """'x', 'x and y', 'x, y and z'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def describe_object(thing: Object) -> str:
    """'a large red star at the top left'."""
    return f"a {thing.size} {thing.colour} {thing.shape} at the {PLACES[thing.cell]}"


def write_caption(objects: Sequence[Object], background: str) -> str:
    """A caption that fixes everything, in the given order of objects."""
    return f"{join_list([describe_object(o) for o in objects])} on a {background} background"


def read_caption(text: str) -> Scene:
    """The scene a caption describes; the inverse of `write_caption` in any order of objects.

    Raises:
        ValueError: something is not named, named twice, or not understood.
    """
    lowered = text.lower()
    objects = tuple(
        Object(PLACES.index(place), shape, colour, size)
        for size, colour, shape, place in _OBJECT.findall(lowered)
    )
    grounds = _BACKGROUND.findall(lowered)
    if not objects:
        raise ValueError(f"the caption names no object with size, colour, shape and place: {text!r}")
    if len(grounds) != 1:
        raise ValueError(f"the caption must name one background, it names {len(grounds)}: {text!r}")
    if len({o.cell for o in objects}) < len(objects):
        raise ValueError(f"the caption puts two objects in one place: {text!r}")
    rest = _LEFT_OVER.search(_BACKGROUND.sub("", _OBJECT.sub("", lowered)))
    if rest:
        raise ValueError(f"the caption says something else too ({rest.group()!r}): {text!r}")
    return Scene(grounds[0], objects)
