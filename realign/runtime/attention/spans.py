"""Where packed sequences begin and end."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

Derived = TypeVar("Derived")


@dataclass(frozen=True, eq=False)
class Spans:
    """Lengths of packed sequences: of each its queries and its keys.

    With `is_shared` all sequences attend to the same keys, and `k_lengths` has that one length: to a kernel
    they are one sequence of all queries.
    """

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    device: torch.device
    is_shared: bool = False

    @property
    def max_q(self) -> int:
        return sum(self.q_lengths) if self.is_shared else max(self.q_lengths)

    @property
    def max_k(self) -> int:
        return max(self.k_lengths)

    @cached_property
    def cu_q(self) -> Tensor:
        """Where each sequence's queries begin, and the last ones end: int32."""
        return self._offsets((sum(self.q_lengths),) if self.is_shared else self.q_lengths)

    @cached_property
    def cu_k(self) -> Tensor:
        """The same of the keys."""
        return self._offsets(self.k_lengths)

    def repeat_queries(self, count: int) -> Spans:
        """The spans where every query is there so many times, one after the other."""
        lengths = tuple(count * length for length in self.q_lengths)
        return self.remember(count, lambda: Spans(lengths, self.k_lengths, self.device, self.is_shared))

    def remember(self, name: Hashable, build: Callable[[], Derived]) -> Derived:
        """What follows from the spans, built when it is asked for first."""
        if name not in self._derived:
            self._derived[name] = build()
        return self._derived[name]

    @cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}

    def _offsets(self, lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(self.device)
