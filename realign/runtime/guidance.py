"""Guidance branches: the contexts whose velocities are combined, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

from realign.runtime.kv import Context

KINDS = ("conditional", "text", "image")


@dataclass(frozen=True, eq=False)
class Branch:
    """A context and a guidance scale.

    `kind`: "conditional" is all that was read; "text" (unconditional) lacks the instruction, "image"
    (unconditional) the pictures. A scale of 1 or less leaves a branch out; the conditional one's is not used.
    """

    context: Context
    scale: float = 1.0
    kind: str = "conditional"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"branch kind is {self.kind!r}: must be one of {', '.join(KINDS)}")
