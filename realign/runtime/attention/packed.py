"""Rows packed one after the other, without padding: what kernels for sequences of any length take.

N layers, H query heads, K key-value heads, D head dim, L packed new tokens, S tokens of all tails and new
ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.runtime.attention.backends import Backend, OutAndLse
from realign.runtime.attention.spans import Spans
from realign.runtime.kv import Context, copy_tail


class PackedRows:
    """Each row's tail and room for its new tokens behind it; rows without a tail need no room."""

    def __init__(
        self,
        model: Bagel,
        backend: Backend,
        contexts: Sequence[Context],
        lengths: Sequence[int],
        is_causal: bool,
    ) -> None:
        self.backend, self.is_causal = backend, is_causal
        sizes = tuple(context.tail_length + new for context, new in zip(contexts, lengths, strict=True))
        self.spans = Spans(tuple(lengths), sizes, model.device)
        self.slot_L = self.key_NSKD = self.value_NSKD = None
        if any(context.tail_length for context in contexts):
            self._lay_out(model, contexts)

    def attend(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> OutAndLse:
        """New tokens [L, H, D] to their row's tail and new tokens; with log-sum-exps [L, H]."""
        if self.slot_L is None:
            return self.backend.attend(query_LHD, key_LKD, value_LKD, self.spans, self.is_causal)
        key_SKD, value_SKD = self.key_NSKD[layer], self.value_NSKD[layer]
        key_SKD.index_copy_(0, self.slot_L, key_LKD.to(key_SKD.dtype))
        value_SKD.index_copy_(0, self.slot_L, value_LKD.to(value_SKD.dtype))
        return self.backend.attend(
            query_LHD.to(key_SKD.dtype), key_SKD, value_SKD, self.spans, self.is_causal
        )

    def _lay_out(self, model: Bagel, contexts: Sequence[Context]) -> None:
        llm = model.config.llm
        shape = (llm.num_hidden_layers, sum(self.spans.k_lengths), llm.num_key_value_heads, llm.head_dim)
        self.key_NSKD, self.value_NSKD = (
            torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2)
        )
        slots, start = [], 0
        for context, size in zip(contexts, self.spans.k_lengths, strict=True):
            copy_tail(context, self.key_NSKD[:, start:], self.value_NSKD[:, start:])
            slots.append(torch.arange(start + context.tail_length, start + size))
            start += size
        self.slot_L = torch.cat(slots).to(model.device)
