"""Rows that are padded to one shape: what is fastest on a CPU.

After the keys and values of the rows' tails are laid out, once, every layer is one fused attention. Padding
is zeros, behind a mask; how much there is follows from the row alone, so that its bits do not depend on
others.

N layers, R rows, H query heads, K key-value heads, G = H / K, D head dim, L packed new tokens, Q padded new
tokens of a row, C padded tail tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.runtime.attention.backends import OutAndLse, attend_grouped
from realign.runtime.attention.rows import padded_length, padded_new
from realign.runtime.kv import Context, copy_tail


class PaddedRows:
    """Rows of one padded shape; keys and values stay in place, only the new tokens' are rewritten."""

    def __init__(
        self, model: Bagel, contexts: Sequence[Context], lengths: Sequence[int], is_causal: bool
    ) -> None:
        self.num_rows, self.num_new = len(lengths), padded_new(lengths[0], is_causal)
        self.num_past = padded_length(contexts[0].tail_length)
        self.key_NRKSD, self.value_NRKSD = pad_tails(model, contexts, self.num_past + self.num_new)
        self.groups = model.config.llm.num_attention_heads // model.config.llm.num_key_value_heads
        self.slot_L = self._find_slots(lengths, model.device)
        self.mask = self._build_mask(contexts, lengths, is_causal)

    def attend(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> OutAndLse:
        """New tokens [L, H, D] to their row's tail and new tokens; with log-sum-exps [L, H]."""
        key_RKSD, value_RKSD = self.key_NRKSD[layer], self.value_NRKSD[layer]
        key_RKSD[:, :, self.num_past :] = self._pad(key_LKD).transpose(1, 2)
        value_RKSD[:, :, self.num_past :] = self._pad(value_LKD).transpose(1, 2)
        query_RQHD = self._pad(query_LHD).to(key_RKSD.dtype)
        out, lse = (t.flatten(0, 1) for t in attend_grouped(query_RQHD, key_RKSD, value_RKSD, self.mask))
        return (out, lse) if self.slot_L is None else (out[self.slot_L], lse[self.slot_L])

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
        self, contexts: Sequence[Context], lengths: Sequence[int], is_causal: bool
    ) -> Tensor | None:
        """Added to the scores: [R, 1, 1, C + Q], of causal rows [R, 1, G * Q, C + Q]; None: all is seen."""
        past_R1, new_R1 = (
            torch.tensor(v)[:, None] for v in ([context.tail_length for context in contexts], lengths)
        )
        past_RC, new_RQ = torch.arange(self.num_past) < past_R1, torch.arange(self.num_new) < new_R1
        has_future = is_causal and self.num_new > 1
        if past_RC.all() and new_RQ.all() and not has_future:
            return None
        visible = torch.cat((past_RC, new_RQ), dim=1)[:, None, None, :]
        if has_future:
            before_QS = torch.ones(self.num_new, visible.shape[-1], dtype=torch.bool).tril(self.num_past)
            visible = (visible & before_QS).repeat(1, 1, self.groups, 1)
        mask = torch.zeros(visible.shape).masked_fill_(~visible, float("-inf"))
        return mask.to(self.key_NRKSD.device, self.key_NRKSD.dtype)


def pad_tails(model: Bagel, contexts: Sequence[Context], size: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the tails, each with room for `size` tokens: two tensors [N, R, K, size, D]."""
    llm = model.config.llm
    shape = (llm.num_hidden_layers, len(contexts), llm.num_key_value_heads, size, llm.head_dim)
    key, value = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    for row, context in enumerate(contexts):
        copy_tail(context, key[:, row].transpose(1, 2), value[:, row].transpose(1, 2))
    return key, value
