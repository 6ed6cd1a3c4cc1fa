"""What the model has read: keys and values of every layer, in segments that contexts share.

N layers, L tokens, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from realign.model.bagel import Bagel


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys and values of successive tokens, all layers: [N, L, K, D] each, in the model's dtype."""

    key_NLKD: Tensor
    value_NLKD: Tensor

    @property
    def length(self) -> int:
        return self.key_NLKD.shape[1]


@dataclass(frozen=True, eq=False)
class Context:
    """Immutable: extending makes another context that shares these segments. `Context()` has read nothing.

    Attributes:
        segments: in the order they were read.
        length: tokens of all of them.
        next_position: the rotary position of what is read next.
        num_runs: so many of the first segments are runs, which rows attend to together where they share
            them; the others are the tail, which each row attends to by itself.
        weights_version: of the weights that it was read with.
        mark: its own; names the context without holding what it holds.
    """

    segments: tuple[Segment, ...] = ()
    length: int = 0
    next_position: int = 0
    num_runs: int = 0
    weights_version: int = 0
    mark: object = field(init=False, default_factory=object)

    @property
    def runs(self) -> tuple[Segment, ...]:
        return self.segments[: self.num_runs]

    @property
    def tail(self) -> tuple[Segment, ...]:
        return self.segments[self.num_runs :]

    @property
    def tail_length(self) -> int:
        return sum(segment.length for segment in self.tail)

    def key(self, layer: int) -> Tensor:
        """[L, K, D]"""
        return torch.cat([segment.key_NLKD[layer] for segment in self.segments])

    def value(self, layer: int) -> Tensor:
        """[L, K, D]"""
        return torch.cat([segment.value_NLKD[layer] for segment in self.segments])

    def extended(self, segment: Segment, num_positions: int, weights_version: int = 0) -> Context:
        """The context after the tokens of a segment, which take so many rotary positions."""
        assert not self.length or self.weights_version == weights_version
        return replace(
            self,
            segments=(*self.segments, segment),
            length=self.length + segment.length,
            next_position=self.next_position + num_positions,
            weights_version=weights_version,
        )


def check_current(contexts: Iterable[Context], model: Bagel) -> None:
    """Raise ValueError for a context that was read with other weights than the model has now."""
    for context in contexts:
        if context.length and context.weights_version != model.weights_version:
            raise ValueError(
                f"a context was read with version {context.weights_version} of the weights, the model has "
                f"version {model.weights_version} now: read its prompt again"
            )


def join_runs(contexts: Sequence[Context], counts: Sequence[int], least: int) -> list[Context]:
    """Make the first `counts[i]` segments of each context's tail one run, if they have `least` tokens.

    Contexts that have these segments in common have the run in common. A run is one block of memory; the
    segments that it is made of can go.
    """
    runs: dict[tuple[Segment, ...], Segment] = {}
    joined = []
    for context, count in zip(contexts, counts, strict=True):
        first, rest = context.tail[:count], context.tail[count:]
        if count and sum(segment.length for segment in first) >= least:
            run = runs.setdefault(first, None) or _join(first)
            runs[first] = run
            segments = (*context.runs, run, *rest)
            context = replace(context, segments=segments, num_runs=context.num_runs + 1)
        joined.append(context)
    return joined


def _join(segments: tuple[Segment, ...]) -> Segment:
    if len(segments) == 1:
        return Segment(*(t.contiguous() for t in (segments[0].key_NLKD, segments[0].value_NLKD)))
    return Segment(
        torch.cat([segment.key_NLKD for segment in segments], dim=1),
        torch.cat([segment.value_NLKD for segment in segments], dim=1),
    )


def copy_tail(context: Context, key_NSKD: Tensor, value_NSKD: Tensor) -> None:
    """Write the tail's keys and values to the first places of two buffers."""
    end = 0
    for segment in context.tail:
        start, end = end, end + segment.length
        key_NSKD[:, start:end] = segment.key_NLKD
        value_NSKD[:, start:end] = segment.value_NLKD
