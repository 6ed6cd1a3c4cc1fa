"""Which work goes together: the longest waiting, and what is most like it, up to a bound."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Load:
    """What one piece of work adds to a pack.

    Attributes:
        order: work with neighbouring keys is alike, and goes well together.
        shares: bytes by what they are for; what has an equal key in a pack is there once.
        tokens: of the forward.
    """

    order: tuple[Any, ...]
    shares: Mapping[Hashable, int]
    tokens: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.shares.values())


@dataclass(frozen=True)
class Bounds:
    """Of a pack: its bytes, tokens and pieces. The first piece of a pack may exceed them."""

    bytes: float
    tokens: float
    count: float


@dataclass
class Pack:
    """Numbers of chosen loads.

    Attributes:
        largest: bytes of the largest share.
        is_full: whether there was more than fits.
    """

    rows: list[int] = field(default_factory=list)
    shares: dict[Hashable, int] = field(default_factory=dict)
    tokens: int = 0
    is_full: bool = False

    @property
    def bytes(self) -> int:
        return sum(self.shares.values())

    @property
    def largest(self) -> int:
        return max(self.shares.values(), default=0)


def choose_pack(loads: Sequence[Load], bounds: Bounds) -> Pack:
    """Choose from loads, the longest waiting first: that one, and as many that are like it as fit."""
    ranked = sorted(range(len(loads)), key=lambda row: loads[row].order)
    start = ranked.index(0)
    pack, used = Pack(), 0
    for row in ranked[start:] + ranked[:start]:
        load = loads[row]
        new = {key: size for key, size in load.shares.items() if key not in pack.shares}
        size = used + sum(new.values())
        is_over = size > bounds.bytes or pack.tokens + load.tokens > bounds.tokens
        if pack.rows and (is_over or len(pack.rows) >= bounds.count):
            pack.is_full = True
            continue
        pack.rows.append(row)
        pack.shares.update(new)
        pack.tokens += load.tokens
        used = size
    pack.rows.sort()
    return pack
