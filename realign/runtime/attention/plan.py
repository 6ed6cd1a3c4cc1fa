"""Attention of a batch of rows: each to what is its own, all that share a run to that together.

L packed new tokens, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.runtime.attention.backends import Backend, OutAndLse, find_backend
from realign.runtime.attention.packed import PackedRows
from realign.runtime.attention.padded import PaddedRows
from realign.runtime.attention.rows import group_rows, padded_length, padded_new
from realign.runtime.attention.spans import Spans
from realign.runtime.kv import Context, Segment
from realign_kernels import merge_attention

Place = slice | Tensor | None  # of some rows' tokens among all packed ones; None: they are all


class ContextAttention:
    """`attend` for `MixtureOfTransformers`: row r's new tokens see its whole context, and each other.

    Among themselves the new tokens see all, or, in rows with `is_causal`, those before them. Rows in the
    order of `order_rows` are worked on in place; in another they are gathered and put back.
    """

    def __init__(
        self,
        model: Bagel,
        contexts: Sequence[Context],
        lengths: Sequence[int],
        is_causal: Sequence[bool],
        backend: Backend | None = None,
    ) -> None:
        backend = backend or find_backend(model.device, model.dtype)
        starts = [0, *accumulate(lengths)]
        self.own: list[tuple[Place, PaddedRows | PackedRows]] = []
        for rows in _group_own(backend, contexts, lengths, is_causal):
            chosen = [contexts[row] for row in rows], [lengths[row] for row in rows], is_causal[rows[0]]
            group = PaddedRows(model, *chosen) if backend.is_padded else PackedRows(model, backend, *chosen)
            self.own.append((_find_place(rows, starts, model.device), group))
        self.shared = [
            (_find_place(rows, starts, model.device), SharedRun(backend, run, [lengths[r] for r in rows]))
            for run, rows in group_by_run(contexts).items()
        ]

    def __call__(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Tensor:
        own = self._attend_own(layer, query_LHD, key_LKD, value_LKD)
        return add_runs(own, self.shared, layer, query_LHD)

    def _attend_own(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> OutAndLse:
        if len(self.own) == 1:
            return self.own[0][1].attend(layer, query_LHD, key_LKD, value_LKD)
        out_LHD = torch.empty_like(query_LHD)
        wide = torch.promote_types(query_LHD.dtype, torch.float32)
        lse_LH = query_LHD.new_empty(query_LHD.shape[:2], dtype=wide)
        for place, rows in self.own:
            out_LHD[place], lse_LH[place] = rows.attend(
                layer, query_LHD[place], key_LKD[place], value_LKD[place]
            )
        return out_LHD, lse_LH


class SharedRun:
    """Rows that attend to one run."""

    def __init__(self, backend: Backend, run: Segment, lengths: Sequence[int]) -> None:
        self.backend, self.run = backend, run
        self.spans = Spans(tuple(lengths), (run.length,), run.key_NLKD.device, is_shared=True)

    def attend(self, layer: int, query_LHD: Tensor) -> OutAndLse:
        """The rows' new tokens to the run."""
        key_SKD, value_SKD = self.run.key_NLKD[layer], self.run.value_NLKD[layer]
        return self.backend.attend(query_LHD.to(key_SKD.dtype), key_SKD, value_SKD, self.spans)


def add_runs(
    own: OutAndLse, shared: Sequence[tuple[Place, SharedRun]], layer: int, query_LHD: Tensor
) -> Tensor:
    """Attention to each row's own keys, with that to the runs that it shares: [L, H, D]."""
    out_LHD, lse_LH = own
    for place, run in shared:
        if place is None:
            out_LHD, lse_LH = merge_attention(out_LHD, lse_LH, *run.attend(layer, query_LHD))
        else:
            of_run = run.attend(layer, query_LHD[place])
            out_LHD[place], lse_LH[place] = merge_attention(out_LHD[place], lse_LH[place], *of_run)
    return out_LHD


def order_rows(contexts: Sequence[Context], lengths: Sequence[int]) -> list[int]:
    """The rows in an order in which those that go together lie together."""
    number = {run: index for index, run in enumerate(group_by_run(contexts))}

    def key(row: int) -> tuple:
        context = contexts[row]
        return [number[run] for run in context.runs], padded_length(context.tail_length), lengths[row]

    return sorted(range(len(contexts)), key=key)


def group_by_run(contexts: Sequence[Context]) -> dict[Segment, list[int]]:
    """The rows that attend to each run, in their order."""
    rows: dict[Segment, list[int]] = {}
    for row, context in enumerate(contexts):
        for run in context.runs:
            rows.setdefault(run, []).append(row)
    return rows


def _group_own(
    backend: Backend, contexts: Sequence[Context], lengths: Sequence[int], is_causal: Sequence[bool]
) -> list[list[int]]:
    """Rows whose own part is one call: of one padded shape, or all that are causal, and all others."""
    if not backend.is_padded:
        return group_rows(is_causal)
    shapes = (
        (padded_length(context.tail_length), padded_new(new, causal), causal)
        for context, new, causal in zip(contexts, lengths, is_causal, strict=True)
    )
    return group_rows(list(shapes))


def _find_place(rows: Sequence[int], starts: Sequence[int], device: torch.device) -> Place:
    """Where the tokens of rows lie; a slice if they lie together."""
    if len(rows) == len(starts) - 1:
        return None
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(starts[rows[0]], starts[rows[-1] + 1])
    return torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows]).to(device)
