"""`ContextAttention` with a gradient: forward is its own kernels, so that the bits are those of sampling.

Backward recomputes each row's attention, to its whole context and its new tokens, by a path that has a
gradient. It flows to contexts as well where their keys and values have one (`Reader.has_gradient`).

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
from realign.runtime.kv import Context, Segment

# Numbers of one projected tensor in one call of the backward: bounds the copies of contexts that it makes.
MAX_NUMBERS = 2**27


class DifferentiableAttention:
    """`attend` for `MixtureOfTransformers`, as `ContextAttention`."""

    def __init__(
        self,
        model: Bagel,
        contexts: Sequence[Context],
        lengths: Sequence[int],
        is_causal: Sequence[bool],
        backend: Backend | None = None,
    ) -> None:
        with torch.no_grad():  # it copies contexts
            self.forward = ContextAttention(model, contexts, lengths, is_causal, backend)
        self.contexts, self.lengths, self.is_causal = contexts, lengths, is_causal
        segments = dict.fromkeys(s for context in contexts for s in context.segments)
        self.segments = [segment for segment in segments if segment.key_NLKD.requires_grad]
        # Taken apart once: a layer's gradient is a layer's, not one of all layers that is zero elsewhere.
        self.layers = [t.unbind(0) for s in self.segments for t in (s.key_NLKD, s.value_NLKD)]
        starts = [0, *accumulate(lengths)]
        self.places = [slice(start, start + size) for start, size in zip(starts, lengths, strict=False)]
        self.packs = list(self._pack_rows(model.config.llm.num_key_value_heads * model.config.llm.head_dim))

    def __call__(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Tensor:
        past = [of_layers[layer] for of_layers in self.layers]
        return _Attend.apply(self, layer, query_LHD, key_LKD, value_LKD, *past)

    def differentiate(self, layer: int, heads: Sequence[Tensor], grad_LHD: Tensor) -> list[Tensor]:
        """Gradients of packed query, key and value, and of the contexts' segments that have one."""
        grads = [torch.empty_like(head) for head in heads]
        of_segments = _SegmentGradients(self.segments, layer)
        for rows in self.packs:
            parts = [torch.stack([head[self.places[row]] for row in rows]) for head in (*heads, grad_LHD)]
            past, is_causal = self._stack_contexts(layer, rows), self.is_causal[rows[0]]
            found = _differentiate(past, parts[:3], parts[3], is_causal, bool(self.segments))
            for grad, grad_R in zip(grads, found[:3], strict=True):
                for row, part in zip(rows, grad_R, strict=True):
                    grad[self.places[row]] = part
            for index, row in enumerate(rows if found[3:] else ()):
                of_segments.add(self.contexts[row], *(grad_R[index] for grad_R in found[3:]))
        return [*grads, *of_segments.finish()]

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
        shapes = zip(self.contexts, self.lengths, self.is_causal, strict=True)
        for rows in group_rows([(context.length, *shape) for context, *shape in shapes]):
            size = (self.contexts[rows[0]].length + self.lengths[rows[0]]) * width
            count = max(1, MAX_NUMBERS // size)
            packs += [rows[start : start + count] for start in range(0, len(rows), count)]
        return packs


class _SegmentGradients:
    """Of the keys and values of segments, one layer's: added up over rows in float32 at least."""

    def __init__(self, segments: Sequence[Segment], layer: int) -> None:
        self.places = {segment: 2 * number for number, segment in enumerate(segments)}
        tensors = [t[layer] for s in segments for t in (s.key_NLKD, s.value_NLKD)]
        self.dtypes = [t.dtype for t in tensors]
        self.sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]

    def add(self, context: Context, key_SKD: Tensor, value_SKD: Tensor) -> None:
        """A row's, of its whole context."""
        start = 0
        for segment in context.segments:
            end = start + segment.length
            if segment in self.places:
                self.sums[self.places[segment]] += key_SKD[start:end]
                self.sums[self.places[segment] + 1] += value_SKD[start:end]
            start = end

    def finish(self) -> list[Tensor]:
        """Key and value of each segment."""
        return [total.to(dtype) for total, dtype in zip(self.sums, self.dtypes, strict=True)]


def _differentiate(
    past: tuple[Tensor, Tensor] | None,
    heads: Sequence[Tensor],
    grad_RQHD: Tensor,
    is_causal: bool,
    with_past: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the new tokens' query [R, Q, H, D], key and value [R, Q, K, D]; and, `with_past`, of the
    keys and values [R, S, K, D] of what was read, if anything was.
    """
    heads = [head.detach().requires_grad_() for head in heads]
    past = () if past is None else tuple(old.detach().requires_grad_(with_past) for old in past)
    with torch.enable_grad():
        query, key, value = heads
        if past:
            key, value = (
                torch.cat((old.to(new), new), dim=1) for old, new in zip(past, (key, value), strict=True)
            )
        out_RQHD = _attend(query.to(key.dtype), key, value, is_causal)
    inputs = [*heads, *(past if with_past else ())]
    return torch.autograd.grad(out_RQHD, inputs, grad_RQHD.to(out_RQHD.dtype))


def _attend(query_RQHD: Tensor, key_RSKD: Tensor, value_RSKD: Tensor, is_causal: bool) -> Tensor:
    """Plain attention. A key-value head's query heads lie along the query axis: keys are not repeated."""
    num_new, num_keys, kv_heads = query_RQHD.shape[1], *key_RSKD.shape[1:3]
    query = query_RQHD.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    mask = None
    if is_causal and num_new > 1:
        seen_QS = torch.ones(num_new, num_keys, dtype=torch.bool, device=query.device)
        mask = seen_QS.tril(num_keys - num_new).repeat(query.shape[2] // num_new, 1)
    out = F.scaled_dot_product_attention(query, key_RSKD.transpose(1, 2), value_RSKD.transpose(1, 2), mask)
    return out.unflatten(2, (-1, num_new)).permute(0, 3, 1, 2, 4).flatten(2, 3)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        attention: DifferentiableAttention,
        layer: int,
        query_LHD: Tensor,
        key_LKD: Tensor,
        value_LKD: Tensor,
        *past: Tensor,
    ) -> Tensor:
        ctx.attention, ctx.layer = attention, layer
        ctx.save_for_backward(query_LHD, key_LKD, value_LKD)
        return attention.forward(layer, query_LHD, key_LKD, value_LKD)

    @staticmethod
    def backward(ctx: Any, grad_LHD: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.attention.differentiate(ctx.layer, ctx.saved_tensors, grad_LHD))
