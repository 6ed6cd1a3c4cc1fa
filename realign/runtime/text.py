"""Writes text, for many contexts at once: greedy, or sampled with temperature and top-p.

Every sample has its own settings and its own noise stream, one uniform number a token, so what it writes does
not depend on the others. Rows that end make room for those that wait. R rows writing, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.runtime.attention import Backend
from realign.runtime.decoder import MIN_ROOM, TextDecoder
from realign.runtime.graphs import CapturedStep
from realign.runtime.kv import Context, Segment, check_current
from realign.runtime.noise import NoiseKey, token_uniforms
from realign.runtime.request import TextTurn
from realign.runtime.settings import TextSettings

# Steps between two looks at what was written: a look waits for the device. What a row writes after its end,
# until then, is forgotten.
STEPS_AT_ONCE = {"cpu": 1, "cuda": 8}
STEPS_BEFORE = 32


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
    model: Bagel,
    contexts: Sequence[Context],
    settings: Sequence[TextSettings],
    keys: Sequence[NoiseKey],
    max_tokens: int | None = None,
    backend: Backend | None = None,
    record: bool = False,
) -> list[Written]:
    """Let the model write a turn after each context: from bos to eos, or to its settings' `max_tokens`.

    Args:
        contexts, settings: one for each text.
        keys: noise keys of stream "text"; token i uses step i.
        max_tokens: bound on the tokens whose keys and values are held for all rows that write at a time,
            beside the runs that they share; others wait for their places.
        backend: of attention to runs.
        record: give every turn the log-probs of its tokens, under the distributions they were drawn from.
    """
    check_current(contexts, model)
    rows = [_Row(*given) for given in zip(contexts, settings, keys, strict=True)]
    if rows:
        _Writer(model, rows, max_tokens, backend, record).run()
    return [row.finish(model) for row in rows]


def slot_size(context: Context, settings: TextSettings) -> int:
    """Tokens that a row holds for itself at most: its tail, and all that it may write, and read too far."""
    return context.tail_length + max(MIN_ROOM, settings.max_tokens + max(STEPS_AT_ONCE.values()))


@dataclass(eq=False)
class _Row:
    """A text in the making."""

    context: Context
    settings: TextSettings
    key: NoiseKey
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    has_stopped: bool = False
    segment: Segment | None = None

    @property
    def is_done(self) -> bool:
        return self.has_stopped or len(self.ids) >= self.settings.max_tokens

    @property
    def num_read(self) -> int:
        """Tokens that were read to write the text: bos, and all ids; but the last, if the limit cut it."""
        return len(self.ids) + self.has_stopped

    def take(self, token: int, eos: int, logprobs: Sequence[float] = ()) -> None:
        """The next token, and its log-prob if that is recorded."""
        if self.is_done:
            return
        self.logprobs += logprobs
        if token == eos:
            self.has_stopped = True
        else:
            self.ids.append(token)

    def finish(self, model: Bagel) -> Written:
        """The text ends, as BAGEL's does, where the model begins a new turn (bos)."""
        bos = model.tokenizer.bos
        spoken = self.ids[: self.ids.index(bos)] if bos in self.ids else self.ids
        text = model.tokenizer.decode(spoken)
        turn = TextTurn(tuple(self.ids), text, self.has_stopped, tuple(self.logprobs))
        tokens = (bos, *self.ids, model.tokenizer.eos)
        context = self.context.extended(self.segment, self.num_read, model.weights_version)
        return Written(turn, context, tokens[self.num_read :])


class _Writer:
    """Rows that write, in the slots of one decoder, and those that wait for one."""

    def __init__(
        self,
        model: Bagel,
        rows: Sequence[_Row],
        max_tokens: int | None,
        backend: Backend | None,
        record: bool,
    ) -> None:
        self.record = record
        self.model, self.eos = model, model.tokenizer.eos
        self.num_steps = STEPS_AT_ONCE[model.device.type]
        size = max(slot_size(row.context, row.settings) for row in rows)
        num_slots = len(rows) if max_tokens is None else max(1, max_tokens // size)
        self.writing, self.waiting = list(rows[:num_slots]), deque(rows[num_slots:])
        contexts = [row.context for row in self.writing]
        room = size - max(context.tail_length for context in contexts)
        self.decoder = TextDecoder(model, contexts, room, backend)
        self.token_R = torch.full((len(contexts),), model.tokenizer.bos, device=model.device)
        most = max(row.settings.max_tokens for row in rows)
        self.choices = _Choices(rows, len(self.writing), most + self.num_steps, model.device)
        self.step = self._build_step()

    def run(self) -> None:
        """Fills the rows."""
        while self.writing:
            for token_R, logprob_R in self._write_some():
                for index, row in enumerate(self.writing):
                    row.take(token_R[index], self.eos, logprob_R[index : index + 1])
            ended = [index for index, row in enumerate(self.writing) if row.is_done]
            for index in ended:
                row = self.writing[index]
                row.segment = row.segment or self.decoder.segment(index, row.num_read)
            ended = self._refill(ended)
            if ended and (len(ended) > len(self.writing) // 4 or len(ended) == len(self.writing)):
                self._drop(ended)
            elif ended:  # they write on, over what they wrote
                self.decoder.rewind(ended)
                self.choices.step_R[ended] = 0

    def _write_some(self) -> list[tuple[list[int], list[float]]]:
        """The next tokens of all rows, and their log-probs if these are recorded: [T][R] each."""
        tokens, logprobs = [], []
        for _ in range(self.num_steps):
            self.decoder.make_room()
            tokens.append(self.step().clone())
            logprobs.append(self.choices.logprob_R.clone() if self.record else tokens[-1][:0])
        both = (torch.stack(written).tolist() for written in (tokens, logprobs))
        return list(zip(*both, strict=True))

    def _build_step(self) -> CapturedStep[Tensor]:
        """Not recorded at once where rows wait whose runs may be others: recording takes some steps' time."""
        return CapturedStep(self._step, self.model.device, num_before=STEPS_BEFORE if self.waiting else 1)

    def _step(self) -> Tensor:
        """One token of every row, on the device."""
        logits_RV = self.decoder.score(self.token_R)
        self.token_R.copy_(self.choices.choose(logits_RV))
        if self.record:
            self.choices.score(logits_RV, self.token_R)
        return self.token_R

    def _refill(self, ended: Sequence[int]) -> Sequence[int]:
        """Give the places of rows that have ended to rows that wait; returns those that are left."""
        fresh, left = list(ended[: len(self.waiting)]), ended[len(self.waiting) :]
        for index in fresh:
            self.writing[index] = self.waiting.popleft()
            self.token_R[index] = self.model.tokenizer.bos
        if fresh:
            self.choices.put(fresh, [self.writing[index] for index in fresh])
            if self.decoder.replace(fresh, [self.writing[index].context for index in fresh]):
                self.step = self._build_step()
        return left

    def _drop(self, ended: Sequence[int]) -> None:
        keep = [index for index in range(len(self.writing)) if index not in set(ended)]
        self.writing = [self.writing[index] for index in keep]
        if keep:
            self.decoder.keep(keep)
            self.choices.keep(keep)
            self.token_R = self.token_R[keep]
            self.step = self._build_step()


class _Choices:
    """How the rows at each place choose their tokens: their settings, and their uniform numbers.

    Args:
        rows: all that will ever have a place, the first of them those that begin: what a step consists of
            follows from all, and does not change when rows do.
    """

    def __init__(self, rows: Sequence[_Row], num_places: int, num_tokens: int, device: torch.device) -> None:
        self.num_tokens = num_tokens
        self.is_greedy = all(row.settings.temperature == 0 for row in rows)
        self.has_top_p = any(row.settings.top_p < 1 for row in rows)
        self.temperature_R, self.top_p_R, self.logprob_R = (
            torch.ones(num_places, device=device) for _ in range(3)
        )
        self.uniform_RT = torch.zeros(num_places, num_tokens, device=device)
        self.step_R = torch.zeros(num_places, dtype=torch.int64, device=device)
        self.put(range(num_places), rows[:num_places])

    def put(self, places: Sequence[int], rows: Sequence[_Row]) -> None:
        """Let rows begin at these places."""
        index = torch.tensor(places, device=self.step_R.device)
        settings = [row.settings for row in rows]
        self.step_R[index] = 0
        for numbers_R, name in ((self.temperature_R, "temperature"), (self.top_p_R, "top_p")):
            numbers_R[index] = torch.tensor([getattr(own, name) for own in settings]).to(numbers_R)
        if not self.is_greedy:
            uniform_RT = token_uniforms([row.key for row in rows], self.num_tokens)
            self.uniform_RT[index] = uniform_RT.to(index.device)

    def keep(self, places: Sequence[int]) -> None:
        """Forget all rows but these."""
        for name in ("temperature_R", "top_p_R", "logprob_R", "uniform_RT", "step_R"):
            setattr(self, name, getattr(self, name)[places])

    def choose(self, logits_RV: Tensor) -> Tensor:
        """The next token of each row."""
        if self.is_greedy:
            return logits_RV.argmax(dim=-1)
        uniform_R = self.uniform_RT.gather(1, self.step_R[:, None])[:, 0]
        self.step_R += 1
        return choose_tokens(logits_RV, self.temperature_R, self._top_p(), uniform_R)

    def score(self, logits_RV: Tensor, token_R: Tensor) -> None:
        """Put the log-probs of the rows' tokens into `logprob_R`."""
        weight_RV = weigh_tokens(logits_RV, self.temperature_R, self._top_p())
        chosen_R = weight_RV.gather(1, token_R[:, None])[:, 0]
        logprob_R = (chosen_R / weight_RV.sum(dim=-1)).log()
        self.logprob_R.copy_(logprob_R.masked_fill(self.temperature_R == 0, 0.0))

    def _top_p(self) -> Tensor | None:
        return self.top_p_R if self.has_top_p else None


def choose_tokens(
    logits_RV: Tensor, temperature_R: Tensor, top_p_R: Tensor | None, uniform_R: Tensor
) -> Tensor:
    """The next token of each row, int64 [R]; all on one device, and nothing waits for it.

    Temperature 0 takes the largest score. Else the inverse of the cumulative distribution, tokens in the
    order of their ids, at the row's uniform number; with top-p over the fewest tokens whose probabilities
    reach it.
    """
    is_greedy_R = temperature_R == 0
    total_RV = weigh_tokens(logits_RV, temperature_R, top_p_R).cumsum(dim=-1)
    # The first token whose cumulative weight exceeds the target: never one of weight 0.
    target_R1 = uniform_R.double()[:, None] * total_RV[:, -1:]
    chosen_R = torch.searchsorted(total_RV, target_R1, right=True)[:, 0]
    return torch.where(is_greedy_R, logits_RV.argmax(dim=-1), chosen_R)


def weigh_tokens(logits_RV: Tensor, temperature_R: Tensor, top_p_R: Tensor | None) -> Tensor:
    """What the tokens of each row are drawn in proportion to, float64 [R, V]: zero where top-p leaves one
    out. Temperature 0 is taken for 1.
    """
    temperature_R1 = temperature_R.masked_fill(temperature_R == 0, 1.0).double()[:, None]
    weight_RV = torch.softmax(logits_RV.double() / temperature_R1, dim=-1)
    return weight_RV if top_p_R is None else _keep_likeliest(weight_RV, top_p_R)


def _keep_likeliest(weight_RV: Tensor, top_p_R: Tensor) -> Tensor:
    """Zero the tokens that top-p leaves out; rows with top_p 1 stay as they are."""
    top_p_R1 = top_p_R.double()[:, None]
    sorted_RV, order_RV = weight_RV.sort(dim=-1, descending=True, stable=True)
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    is_out_RV = torch.zeros_like(before_RV, dtype=torch.bool)
    is_out_RV.scatter_(1, order_RV, (before_RV >= top_p_R1) & (top_p_R1 < 1))
    return weight_RV.masked_fill(is_out_RV, 0.0)
