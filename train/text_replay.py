"""Takes texts again that the model wrote: their tokens' log-probs, through the weights as they are now.

A text is replayed in one piece, behind its context, which is read anew; the gradient is the whole one,
through what was read as well. Sampling has other forwards (a token at a time), so its log-probs differ in
their last bits from those of a replay: the old log-probs of a ratio are a replay's by the rollout's weights.

T tokens of texts, packed; V vocabulary, E model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from realign.model.mot import Route
from realign.reasoning.programs import ReasoningProgram
from realign.runtime.attention.gradient import DifferentiableAttention
from realign.runtime.attention.plan import ContextAttention
from realign.runtime.engine import Engine
from realign.runtime.kv import Context
from realign.runtime.operations import Draw, Drawn, Read, Write
from realign.runtime.reader import Reader, Reading
from realign.runtime.request import Sample, TextPart
from realign.runtime.text import Written, weigh_tokens
from train.replay import build_reader

SCORED_TOKENS = 512  # of one call of the head: what it computes over the vocabulary is not kept


@dataclass(frozen=True, eq=False)
class TextEntry:
    """A text that the model wrote, the `index`th of a sample.

    Attributes:
        number: the sample's, among those of the iteration.
        tokens: what the model chose: ids, and bos or eos where it ended the text with one.
        sampled: their log-probs as recorded while sampling.
    """

    sample: Sample
    index: int
    number: int
    tokens: tuple[int, ...]
    sampled: tuple[float, ...]


def list_texts(samples: Sequence[Sample], bos: int, eos: int) -> list[TextEntry]:
    """All texts that samples' models wrote. What follows a bos is no part of a text, and left out."""
    entries = []
    for number, sample in enumerate(samples):
        for index, turn in enumerate(sample.trajectory.text_turns):
            tokens = (*turn.ids, eos) if turn.stopped else turn.ids
            count = tokens.index(bos) + 1 if bos in tokens else len(tokens)
            entries.append(TextEntry(sample, index, number, tokens[:count], turn.logprobs[:count]))
    return entries


class TextReplayer:
    """Replays texts with an engine's model, programs and kernels."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.model = engine, engine.model
        self.reader = build_reader(engine, has_gradient=True)

    def score(self, entries: Sequence[TextEntry], kept: Sequence[Tensor | None]) -> Tensor:
        """Log-probs float32 [T] of all entries' tokens, of the distributions that they were drawn from:
        temperature as in their settings, over the tokens that `kept` says; differentiable if that is enabled.

        Args:
            kept: as `find_kept` gives them, for each entry; None: all of the vocabulary.
        """
        hidden_TE = self._forward(entries)
        parts = []
        for entry, own, own_TE in zip(entries, kept, self._split(entries, hidden_TE), strict=True):
            for start in range(0, len(own_TE), SCORED_TOKENS):
                end = start + SCORED_TOKENS
                chosen_T = torch.tensor(entry.tokens[start:end], device=self.model.device)
                temperature = entry.sample.request.settings.text.temperature
                given = (own_TE[start:end], chosen_T, temperature, _cut(own, start, end))
                parts.append(checkpoint(self._score, *given, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(parts)

    @torch.no_grad()
    def find_kept(self, entries: Sequence[TextEntry]) -> list[Tensor | None]:
        """What top-p left to choose from: int64 [K, 2] on the CPU, token number and vocabulary id; None: all.

        It is the rollout's choice, and stays as it is when the weights change: else a token that was drawn
        could have the probability 0 (as "keep sampling mask" of DeepSeek-V3.2, arXiv 2512.02556).
        """
        if all(entry.sample.request.settings.text.top_p == 1 for entry in entries):
            return [None] * len(entries)
        hidden_TE = self._forward(entries)
        return [self._keep(*pair) for pair in zip(entries, self._split(entries, hidden_TE), strict=True)]

    def _keep(self, entry: TextEntry, hidden_TE: Tensor) -> Tensor:
        settings, found = entry.sample.request.settings.text, []
        for start in range(0, len(hidden_TE), SCORED_TOKENS):
            logits_TV = self.model.logits(hidden_TE[start : start + SCORED_TOKENS]).float()
            numbers_T = [torch.full((len(logits_TV),), x) for x in (settings.temperature, settings.top_p)]
            is_kept_TV = weigh_tokens(logits_TV, *(t.to(logits_TV) for t in numbers_T)) > 0
            chosen_T = torch.tensor(entry.tokens[start : start + SCORED_TOKENS], device=logits_TV.device)
            is_kept_TV.scatter_(1, chosen_T[:, None], True)  # it was drawn: a last bit may say otherwise
            places_K2 = is_kept_TV.nonzero()
            places_K2[:, 0] += start
            found.append(places_K2.cpu())
        return torch.cat(found)

    def _score(
        self, hidden_TE: Tensor, chosen_T: Tensor, temperature: float, kept_K2: Tensor | None
    ) -> Tensor:
        logits_TV = self.model.logits(hidden_TE).float() / temperature
        if kept_K2 is not None:
            is_out_TV = torch.ones_like(logits_TV, dtype=torch.bool)
            is_out_TV[tuple(kept_K2.to(is_out_TV.device).T)] = False
            logits_TV = logits_TV.masked_fill(is_out_TV, -torch.inf)
        return logits_TV.log_softmax(-1).gather(1, chosen_T[:, None])[:, 0]

    def _forward(self, entries: Sequence[TextEntry]) -> Tensor:
        """Final hidden states [T, E], of the token before each."""
        model, bos = self.model, self.model.tokenizer.bos
        self.reader.forget_contexts()
        contexts = self._find_contexts(entries)
        ids = [(bos, *entry.tokens[:-1]) for entry in entries]
        lengths = [len(own) for own in ids]
        starts = [context.next_position for context in contexts]
        position_L = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
        everywhere_L = torch.arange(sum(lengths), device=model.device)
        kind = DifferentiableAttention if torch.is_grad_enabled() else ContextAttention
        attend = kind(model, contexts, lengths, [True] * len(lengths), self.engine.backend)
        embedded_LE = model.embed_text(torch.tensor([i for own in ids for i in own], device=model.device))
        route = Route(everywhere_L, everywhere_L[:0])
        return model.decoder(embedded_LE, position_L.to(model.device), route, attend)

    def _split(self, entries: Sequence[TextEntry], packed_TE: Tensor) -> Sequence[Tensor]:
        return packed_TE.split([len(entry.tokens) for entry in entries])

    def _find_contexts(self, entries: Sequence[TextEntry]) -> list[Context]:
        """What each text was written after."""
        samples = {id(entry.sample): entry.sample for entry in entries}
        last = {id(entry.sample): entry.index for entry in sorted(entries, key=lambda entry: entry.index)}
        counts = [last[key] + 1 for key in samples]
        found = find_contexts(self.engine, self.reader, list(samples.values()), counts)
        by_sample = dict(zip(samples, found, strict=True))
        return [by_sample[id(entry.sample)][entry.index] for entry in entries]


def find_contexts(
    engine: Engine, reader: Reader, samples: Sequence[Sample], counts: Sequence[int]
) -> list[list[Context]]:
    """The contexts that the first `counts` texts of each sample were written after, read anew: programs are
    run side by side, and given what they wrote and drew.
    """
    walks = [_Walk(engine, sample, count) for sample, count in zip(samples, counts, strict=True)]
    while waiting := [walk for walk in walks if not walk.is_done]:
        contexts = iter(reader.read([reading for walk in waiting for reading in walk.readings]))
        for walk in waiting:
            walk.go_on([next(contexts) for _ in walk.readings])
    return [walk.found for walk in walks]


class _Walk:
    """A program that is run again, up to what it wrote last."""

    def __init__(self, engine: Engine, sample: Sample, count: int) -> None:
        self.sample, self.count = sample, count
        self.found: list[Context] = []
        program: ReasoningProgram = engine.programs[sample.request.settings.reasoning]
        self.program: Iterator[Any] = program(replace(sample.request, turns=()))
        self._take(next(self.program))

    @property
    def is_done(self) -> bool:
        return len(self.found) == self.count

    @property
    def readings(self) -> tuple[Reading, ...]:
        """What has to be read before it goes on."""
        if isinstance(self.operation, Read):
            return self.operation.readings
        if isinstance(self.operation, Write):
            turn = self.sample.trajectory.text_turns[len(self.found) - 1]
            return (Reading((TextPart(turn.text),), self.operation.context),)
        return ()

    def go_on(self, contexts: Sequence[Context]) -> None:
        """Give the program what it waits for; `contexts` are of `readings`."""
        trajectory, result = self.sample.trajectory, contexts
        if isinstance(self.operation, Write):
            result = Written(trajectory.text_turns[len(self.found) - 1], contexts[0], ())
        elif isinstance(self.operation, Draw):
            own = (trajectory.noise_key, trajectory.latent_LC, trajectory.steps, trajectory.recording)
            result = Drawn(self.sample.picture, *own)
        self._take(self.program.send(result))

    def _take(self, operation: Any) -> None:
        self.operation = operation
        if isinstance(operation, Write):
            self.found.append(operation.context)


def _cut(kept_K2: Tensor | None, start: int, end: int) -> Tensor | None:
    """Those of some tokens, numbered from the first of them."""
    if kept_K2 is None:
        return None
    own_K2 = kept_K2[(kept_K2[:, 0] >= start) & (kept_K2[:, 0] < end)]
    return own_K2 - torch.tensor([start, 0])
