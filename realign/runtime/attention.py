"""Attention of packed new tokens to their rows' contexts and to each other, by padding.

A row is a context and the new tokens after it. Rows that are padded to one shape go together, once, when a
call (or a whole denoising loop) begins; after that every layer is one fused attention per group of rows.
Padding is zeros, behind a mask; how much there is follows from the row alone, so that its bits do not depend
on the others.

N layers, R rows, H query heads, K key-value heads, G = H / K, D head dim, L packed new tokens, Q padded new
tokens of a row, C padded context tokens of a row.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from realign.model.bagel import Bagel

if TYPE_CHECKING:
    from realign.runtime.context import Context

# Contexts are padded to multiples of this many tokens, or, where that is more, of a sixteenth to an eighth of
# their length; causal new tokens to multiples of `NEW_MULTIPLE`.
PAST_MULTIPLE, NEW_MULTIPLE = 64, 16


class PaddedAttention:
    """`attend` for `MixtureOfTransformers`: row r's new tokens see its whole context, and each other.

    Among themselves the new tokens see all, or, in rows with `is_causal`, those before them.
    """

    def __init__(
        self, model: Bagel, contexts: Sequence[Context], lengths: Sequence[int], is_causal: Sequence[bool]
    ) -> None:
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        groups = group_rows(
            [
                (padded_length(context.length), padded_new(length, causal))
                for context, length, causal in zip(contexts, lengths, is_causal, strict=True)
            ]
        )
        self.groups = [
            _Group(model, *([values[row] for row in rows] for values in (contexts, lengths, is_causal)))
            for rows in groups
        ]
        packed = [torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows]) for rows in groups]
        self.packed_index = [index_L.to(model.device) for index_L in packed] if len(groups) > 1 else None

    def __call__(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Tensor:
        if self.packed_index is None:
            return self.groups[0].attend(layer, query_LHD, key_LKD, value_LKD)
        out_LHD = torch.empty_like(query_LHD)
        for group, index_L in zip(self.groups, self.packed_index, strict=True):
            new = (tensor.index_select(0, index_L) for tensor in (query_LHD, key_LKD, value_LKD))
            out_LHD.index_copy_(0, index_L, group.attend(layer, *new))
        return out_LHD


class _Group:
    """Rows that are padded together; keys and values stay in place, only the new tokens' are rewritten."""

    def __init__(
        self, model: Bagel, contexts: Sequence[Context], lengths: Sequence[int], is_causal: Sequence[bool]
    ) -> None:
        self.num_rows, self.num_new = len(lengths), padded_new(lengths[0], is_causal[0])
        self.num_past = padded_length(contexts[0].length)
        self.key_NRKSD, self.value_NRKSD = pad_contexts(model, contexts, self.num_new)
        self.groups = model.config.llm.num_attention_heads // model.config.llm.num_key_value_heads
        self.slot_L = self._find_slots(lengths, model.device)
        self.mask = self._build_mask(contexts, lengths, is_causal)

    def attend(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Tensor:
        key_RKSD, value_RKSD = self.key_NRKSD[layer], self.value_NRKSD[layer]
        key_RKSD[:, :, self.num_past :] = self._pad(key_LKD).transpose(1, 2)
        value_RKSD[:, :, self.num_past :] = self._pad(value_LKD).transpose(1, 2)
        query_RQHD = self._pad(query_LHD).to(key_RKSD.dtype)
        out_RQHD = grouped_attention(query_RQHD, key_RKSD, value_RKSD, self.mask)
        out_LHD = out_RQHD.reshape(-1, *query_LHD.shape[1:])
        return out_LHD if self.slot_L is None else out_LHD.index_select(0, self.slot_L)

    def _find_slots(self, lengths: Sequence[int], device: torch.device) -> Tensor | None:
        """Where each packed token lies in [R * Q]; None if all rows are equally long: it lies there."""
        if min(lengths) == self.num_new:
            return None
        slots = [torch.arange(length) + row * self.num_new for row, length in enumerate(lengths)]
        return torch.cat(slots).to(device)

    def _pad(self, packed_LHD: Tensor) -> Tensor:
        """[L, H, D] to [R, Q, H, D]."""
        shape = (self.num_rows, self.num_new, *packed_LHD.shape[1:])
        if self.slot_L is None:
            return packed_LHD.view(shape)
        padded = packed_LHD.new_zeros(self.num_rows * self.num_new, *packed_LHD.shape[1:])
        return padded.index_copy_(0, self.slot_L, packed_LHD).view(shape)

    def _build_mask(
        self, contexts: Sequence[Context], lengths: Sequence[int], is_causal: Sequence[bool]
    ) -> Tensor | None:
        """Added to the scores: [R, 1, 1, C + Q], with causal rows [R, 1, G * Q, C + Q]; None: all is seen."""
        past_R, new_R = (
            torch.tensor(v)[:, None] for v in ([context.length for context in contexts], lengths)
        )
        past_RC, new_RQ = torch.arange(self.num_past) < past_R, torch.arange(self.num_new) < new_R
        is_causal = [causal and self.num_new > 1 for causal in is_causal]
        if past_RC.all() and new_RQ.all() and not any(is_causal):
            return None
        visible = torch.cat((past_RC, new_RQ), dim=1)[:, None, None, :]
        if any(is_causal):
            before_QQ = torch.ones(self.num_new, self.num_new, dtype=torch.bool).tril()
            before_QS = torch.cat(
                (torch.ones(self.num_new, self.num_past, dtype=torch.bool), before_QQ), dim=1
            )
            visible = visible & (before_QS | ~torch.tensor(is_causal)[:, None, None, None])
            visible = visible.repeat(1, 1, self.groups, 1)
        mask = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        return mask.to(self.key_NRKSD.device, self.key_NRKSD.dtype)


def grouped_attention(
    query_RQHD: Tensor, key_RKSD: Tensor, value_RKSD: Tensor, mask: Tensor | None
) -> Tensor:
    """softmax(q k / sqrt(D) + mask) v with H / K query heads to each key-value head. Returns: [R, Q, H, D].

    The query heads of one key-value head are laid along the query axis, so that keys and values are not
    repeated.
    """
    num_rows, num_new, num_heads, dim = query_RQHD.shape
    kv_heads = key_RKSD.shape[1]
    query = query_RQHD.view(num_rows, num_new, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    query = query.reshape(num_rows, kv_heads, -1, dim)
    out = F.scaled_dot_product_attention(query, key_RKSD, value_RKSD, attn_mask=mask)
    out = out.view(num_rows, kv_heads, num_heads // kv_heads, num_new, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(num_rows, num_new, num_heads, dim)


def pad_contexts(model: Bagel, contexts: Sequence[Context], num_extra: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all contexts, and room behind them: two tensors [N, R, K, C + num_extra, D]."""
    llm = model.config.llm
    num_past = max(padded_length(context.length) for context in contexts)
    shape = (
        llm.num_hidden_layers,
        len(contexts),
        llm.num_key_value_heads,
        num_past + num_extra,
        llm.head_dim,
    )
    key, value = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    for row, context in enumerate(contexts):
        end = 0
        for segment in context.segments:
            start, end = end, end + segment.key_NLKD.shape[1]
            key[:, row, :, start:end] = segment.key_NLKD.transpose(1, 2)
            value[:, row, :, start:end] = segment.value_NLKD.transpose(1, 2)
    return key, value


def padded_length(length: int) -> int:
    """The tokens that a context is padded to: a function of its own length, so that its sums are its own.

    (A longer padding is masked all the same, but where a sum is cut into vectors moves its last bits.)
    """
    multiple = max(PAST_MULTIPLE, 2 ** (length.bit_length() - 4)) if length else 1
    return -(-length // multiple) * multiple


def padded_new(length: int, is_causal: bool) -> int:
    """The same of new tokens. Pictures come in few sizes, and are not padded."""
    return -(-length // NEW_MULTIPLE) * NEW_MULTIPLE if is_causal else length


def group_rows(shapes: Sequence[Hashable]) -> list[list[int]]:
    """The rows of each padded shape, in their order."""
    groups: dict[Hashable, list[int]] = {}
    for row, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(row)
    return list(groups.values())


def pack_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split rows, longest first, into parts that have at most `max_tokens` tokens when padded."""
    packs: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if packs and (len(packs[-1]) + 1) * lengths[packs[-1][0]] <= max_tokens:
            packs[-1].append(row)
        else:
            packs.append([row])
    return [sorted(pack) for pack in packs]
