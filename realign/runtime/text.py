"""Writes text, for many contexts at once: greedy, or sampled with temperature and top-p.

Every sample has its own settings and its own noise stream, one uniform number a token, so what it writes does
not depend on the others. R rows still writing, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.model.mot import Route
from realign.runtime.attention import group_rows, grouped_attention, pad_contexts, padded_length
from realign.runtime.context import Context, Segment
from realign.runtime.noise import NoiseKey, token_uniforms
from realign.runtime.request import TextTurn
from realign.runtime.settings import TextSettings

MIN_ROOM = 64


@dataclass(frozen=True, eq=False)
class Written:
    """A text turn that the model wrote, and what it has read of it while writing.

    Attributes:
        context: has read the turn's first tokens, bos included: all that had to be read to choose the others.
        rest: ids of the turn's last tokens, eos included, that are still to be read.
    """

    turn: TextTurn
    context: Context
    rest: tuple[int, ...]


@torch.no_grad()
def decode_text(
    model: Bagel, contexts: Sequence[Context], settings: Sequence[TextSettings], keys: Sequence[NoiseKey]
) -> list[Written]:
    """Let the model write a turn after each context: from bos to eos, or to `max_tokens`.

    Args:
        contexts, settings: one for each text.
        keys: noise keys of stream "text"; token i uses step i.
    """
    rows = [_Row(*given) for given in zip(contexts, settings, keys, strict=True)]
    for group in group_rows([padded_length(context.length) for context in contexts]):
        _write(model, [rows[row] for row in group])
    return [row.finish(model) for row in rows]


def _write(model: Bagel, rows: Sequence[_Row]) -> None:
    """Fills the rows; their contexts are padded to one length."""
    writing, decoder = list(rows), TextDecoder(model, [row.context for row in rows])
    token_R = torch.full((len(rows),), model.tokenizer.bos)
    while writing:
        token_R = choose_tokens(decoder.step(token_R), *_sampling_numbers(writing))
        for row, token in zip(writing, token_R.tolist(), strict=True):
            row.take(token, model.tokenizer.eos)
        if sum(row.is_done for row in writing) > len(writing) // 4 or all(row.is_done for row in writing):
            for index, row in enumerate(writing):
                if row.is_done:
                    row.segment = decoder.segment(index, row.num_read)
            keep = [index for index, row in enumerate(writing) if not row.is_done]
            writing, token_R = [writing[index] for index in keep], token_R[keep]
            decoder.keep(keep)


class TextDecoder:
    """Reads one token a row and step, and scores the next; keys and values grow in place.

    Contexts are padded once; new tokens go to a common column behind the longest padding.
    """

    def __init__(self, model: Bagel, contexts: Sequence[Context]) -> None:
        self.model = model
        self.num_used = self.num_past = max(padded_length(context.length) for context in contexts)
        self.key_NRKSD, self.value_NRKSD = pad_contexts(model, contexts, MIN_ROOM)
        past_R1 = torch.tensor([context.length for context in contexts])[:, None]
        is_padding = (torch.arange(self.key_NRKSD.shape[3]) >= past_R1) & (
            torch.arange(self.key_NRKSD.shape[3]) < self.num_used
        )
        mask = torch.zeros(is_padding.shape).masked_fill_(is_padding, float("-inf"))[:, None, None, :]
        self.mask_R11S = mask.to(model.device, model.dtype)
        self.position_R = torch.tensor([context.next_position for context in contexts], device=model.device)

    @torch.no_grad()
    def step(self, token_R: Tensor) -> Tensor:
        """Tokens int64 [R] to the scores of what follows them, float32 [R, V]."""
        self._make_room()
        self.num_used += 1
        everywhere = torch.arange(len(token_R), device=self.model.device)
        hidden_RE = self.model.decoder(
            self.model.embed_text(token_R.to(self.model.device)),
            self.position_R,
            Route(everywhere, everywhere[:0]),
            self._attend,
        )
        self.position_R = self.position_R + 1
        return self.model.logits(hidden_RE).float()

    def segment(self, row: int, num_tokens: int) -> Segment:
        """The first tokens that a row has read here."""
        end = self.num_past + num_tokens
        key_NLKD, value_NLKD = (
            t[:, row, :, self.num_past : end].transpose(1, 2).contiguous()
            for t in (self.key_NRKSD, self.value_NRKSD)
        )
        return Segment(key_NLKD, value_NLKD)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.model.device)
        self.key_NRKSD, self.value_NRKSD = (
            t.index_select(1, index) for t in (self.key_NRKSD, self.value_NRKSD)
        )
        self.mask_R11S, self.position_R = self.mask_R11S[index], self.position_R[index]

    def _attend(self, layer: int, query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor) -> Tensor:
        key_RKSD, value_RKSD = (t[layer, :, :, : self.num_used] for t in (self.key_NRKSD, self.value_NRKSD))
        key_RKSD[:, :, -1], value_RKSD[:, :, -1] = key_RKD, value_RKD
        query_R1HD = query_RHD[:, None].to(key_RKSD.dtype)
        return grouped_attention(query_R1HD, key_RKSD, value_RKSD, self.mask_R11S[..., : self.num_used])[:, 0]

    def _make_room(self) -> None:
        size = self.key_NRKSD.shape[3]
        if self.num_used == size:
            extra = max(MIN_ROOM, size // 4)
            self.key_NRKSD, self.value_NRKSD = (
                torch.nn.functional.pad(t, (0, 0, 0, extra)) for t in (self.key_NRKSD, self.value_NRKSD)
            )
            self.mask_R11S = torch.nn.functional.pad(self.mask_R11S, (0, extra))


def choose_tokens(logits_RV: Tensor, temperature_R: Tensor, top_p_R: Tensor, uniform_R: Tensor) -> Tensor:
    """The next token of each row, int64 [R], on the device of the scores (the other numbers are on the CPU).

    Temperature 0 takes the largest score. Else the inverse of the cumulative distribution, tokens in the
    order of their ids, at the row's uniform number; with top_p < 1 over the fewest tokens whose probabilities
    reach it.
    """
    greedy_R = logits_RV.argmax(dim=-1)
    rows = temperature_R.nonzero()[:, 0]
    if not len(rows):
        return greedy_R
    device = logits_RV.device
    temperature_R1, uniform_R1 = (t[rows, None].to(device, torch.float64) for t in (temperature_R, uniform_R))
    weight_RV = torch.softmax(logits_RV[rows.to(device)].double() / temperature_R1, dim=-1)
    weight_RV = _keep_likeliest(weight_RV, top_p_R[rows])
    total_RV = weight_RV.cumsum(dim=-1)
    # The first token whose cumulative weight exceeds the target: never one of weight 0.
    chosen_R = torch.searchsorted(total_RV, uniform_R1 * total_RV[:, -1:], right=True)[:, 0]
    return greedy_R.index_copy(0, rows.to(device), chosen_R)


def _keep_likeliest(weight_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """Zero the tokens that top-p leaves out; rows with top_p 1 stay as they are."""
    rows = (top_p_R < 1).nonzero()[:, 0]
    if not len(rows):
        return weight_RV
    top_p_R1 = top_p_R[rows, None].to(weight_RV.device, torch.float64)
    rows = rows.to(weight_RV.device)
    sorted_RV, order_RV = weight_RV[rows].sort(dim=-1, descending=True, stable=True)
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    sorted_RV = sorted_RV.masked_fill(before_RV >= top_p_R1, 0.0)
    return weight_RV.index_copy(0, rows, torch.zeros_like(sorted_RV).scatter_(1, order_RV, sorted_RV))


@dataclass
class _Row:
    """A text in the making."""

    context: Context
    settings: TextSettings
    key: NoiseKey
    ids: list[int] = field(default_factory=list)
    has_stopped: bool = False
    segment: Segment | None = None

    @property
    def is_done(self) -> bool:
        return self.has_stopped or len(self.ids) >= self.settings.max_tokens

    @property
    def num_read(self) -> int:
        """Tokens that were read to write the text: bos, and all ids; but the last, if the limit cut it."""
        return len(self.ids) + self.has_stopped

    def take(self, token: int, eos: int) -> None:
        if self.is_done:
            return
        if token == eos:
            self.has_stopped = True
        else:
            self.ids.append(token)

    def finish(self, model: Bagel) -> Written:
        """The text ends, as BAGEL's does, where the model begins a new turn (bos)."""
        bos = model.tokenizer.bos
        spoken = self.ids[: self.ids.index(bos)] if bos in self.ids else self.ids
        turn = TextTurn(tuple(self.ids), model.tokenizer.decode(spoken), self.has_stopped)
        tokens = (bos, *self.ids, model.tokenizer.eos)
        context = self.context.extended(self.segment, self.num_read)
        return Written(turn, context, tokens[self.num_read :])


def _sampling_numbers(rows: Sequence[_Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature, top-p and the uniform of each row's next token."""
    temperature_R = torch.tensor([row.settings.temperature for row in rows])
    top_p_R = torch.tensor([row.settings.top_p for row in rows])
    if not temperature_R.any():
        return temperature_R, top_p_R, torch.zeros(len(rows))
    # All rows that are still writing have written equally many tokens.
    step = max(len(row.ids) for row in rows)
    return temperature_R, top_p_R, token_uniforms([row.key for row in rows], step)
