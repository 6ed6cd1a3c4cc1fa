"""`ContextAttention` with a gradient: forward is its own kernels, so that the bits are those of sampling.

Backward recomputes each row's attention, to its whole context and its new tokens, by a path that has a
gradient. Contexts are constants: none flows to them.

R rows of one shape, Q new tokens of a row, S tokens of its context, L packed new tokens, H query heads, K
key-value heads, G = H / K, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from realign.model.bagel import Bagel
from realign.runtime.attention.backends import Backend
from realign.runtime.attention.plan import ContextAttention
from realign.runtime.attention.rows import group_rows
from realign.runtime.kv import Context

# Numbers of one projected tensor in one call of the backward: bounds the copies of contexts that it makes.
MAX_NUMBERS = 2**27


class DifferentiableAttention:
    """`attend` for `MixtureOfTransformers`, as `ContextAttention`; rows must not be causal."""

    def __init__(
        self,
        model: Bagel,
        contexts: Sequence[Context],
        lengths: Sequence[int],
        is_causal: Sequence[bool],
        backend: Backend | None = None,
    ) -> None:
        assert not any(is_causal)
        self.forward = ContextAttention(model, contexts, lengths, is_causal, backend)
        self.contexts, self.lengths = contexts, lengths
        starts = [0, *accumulate(lengths)]
        self.places = [slice(start, start + size) for start, size in zip(starts, lengths, strict=False)]
        self.packs = list(self._pack_rows(model.config.llm.num_key_value_heads * model.config.llm.head_dim))

    def __call__(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Tensor:
        return _Attend.apply(query_LHD, key_LKD, value_LKD, self, layer)

    def differentiate(self, layer: int, heads: Sequence[Tensor], grad_LHD: Tensor) -> list[Tensor]:
        """Gradients of packed query, key and value."""
        grads = [torch.empty_like(head) for head in heads]
        for rows in self.packs:
            parts = [torch.stack([head[self.places[row]] for row in rows]) for head in (*heads, grad_LHD)]
            found = _differentiate(self._stack_contexts(layer, rows), parts[:3], parts[3])
            for grad, grad_R in zip(grads, found, strict=True):
                for row, part in zip(rows, grad_R, strict=True):
                    grad[self.places[row]] = part
        return grads

    def _stack_contexts(self, layer: int, rows: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Keys and values [R, S, K, D] that rows of one shape have read; None where they read nothing."""
        if not self.contexts[rows[0]].length:
            return None
        contexts = [self.contexts[row] for row in rows]
        return (
            torch.stack([context.key(layer) for context in contexts]),
            torch.stack([context.value(layer) for context in contexts]),
        )

    def _pack_rows(self, width: int) -> list[list[int]]:
        """Rows of one shape, as many as a call takes."""
        packs = []
        for rows in group_rows([(c.length, n) for c, n in zip(self.contexts, self.lengths, strict=True)]):
            size = (self.contexts[rows[0]].length + self.lengths[rows[0]]) * width
            count = max(1, MAX_NUMBERS // size)
            packs += [rows[start : start + count] for start in range(0, len(rows), count)]
        return packs


def _differentiate(
    past: tuple[Tensor, Tensor] | None, heads: Sequence[Tensor], grad_RQHD: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the new tokens' query [R, Q, H, D], key and value [R, Q, K, D]."""
    heads = [head.detach().requires_grad_() for head in heads]
    with torch.enable_grad():
        query, key, value = heads
        if past is not None:
            key, value = (
                torch.cat((old.to(new), new), dim=1) for old, new in zip(past, (key, value), strict=True)
            )
        out_RQHD = _attend(query.to(key.dtype), key, value)
    return torch.autograd.grad(out_RQHD, heads, grad_RQHD.to(out_RQHD.dtype))


def _attend(query_RQHD: Tensor, key_RSKD: Tensor, value_RSKD: Tensor) -> Tensor:
    """Plain attention. A key-value head's query heads lie along the query axis: keys are not repeated."""
    num_new, kv_heads = query_RQHD.shape[1], key_RSKD.shape[2]
    query = query_RQHD.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    out = F.scaled_dot_product_attention(query, key_RSKD.transpose(1, 2), value_RSKD.transpose(1, 2))
    return out.unflatten(2, (-1, num_new)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_LHD: Tensor,
        key_LKD: Tensor,
        value_LKD: Tensor,
        attention: DifferentiableAttention,
        layer: int,
    ) -> Tensor:
        ctx.attention, ctx.layer = attention, layer
        ctx.save_for_backward(query_LHD, key_LKD, value_LKD)
        return attention.forward(layer, query_LHD, key_LKD, value_LKD)

    @staticmethod
    def backward(ctx: Any, grad_LHD: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.attention.differentiate(ctx.layer, ctx.saved_tensors, grad_LHD)
        return (*grads, None, None)
