"""What samples have in common is read once, held once, attended to together; and changes no sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.kv import Context
from realign.runtime.noise import NoiseKey
from realign.runtime.prepare import crop_picture
from realign.runtime.reader import Reader, Reading
from realign.runtime.settings import TextSettings
from realign.runtime.text import decode_text, slot_size
from tests.runtime.test_independence import check_same

pytestmark = pytest.mark.usefixtures("poison_fresh_memory")

ATTENTIONS = ("sdpa", "reference")  # rows padded, and rows packed


def build_engine(model, attention: str = "auto", run_tokens: int = 256) -> Engine:
    return Engine(model, PROGRAMS, prepare=crop_picture, attention=attention, run_tokens=run_tokens)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("run_tokens", [1, 30, 10**9])
def test_samples_are_those_of_contexts_that_are_not_shared(model, mixed_requests, attention, run_tokens):
    engine = build_engine(model, attention, run_tokens)
    check_same(engine.run(mixed_requests), build_engine(model).run(mixed_requests))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_sample_has_its_bits_in_any_company(model, mixed_requests, attention):
    engine = build_engine(model, attention, run_tokens=1)
    group = [replace(mixed_requests[2], id=f"sample {number}") for number in range(3)]
    together = engine.run([*mixed_requests, *group])
    for sample in together:
        (alone,) = engine.run([sample.request])
        assert alone.trajectory.text_turns == sample.trajectory.text_turns
        assert torch.equal(alone.trajectory.latent_LC, sample.trajectory.latent_LC)


def read_group(model, request, run_tokens: int, count: int) -> list[dict[str, Context]]:
    """The branches' contexts of a group of samples of one prompt."""
    program = PROGRAMS[request.settings.reasoning]
    reader = Reader(model, crop_picture, max_tokens=10**6, run_tokens=run_tokens)
    kinds, parts = zip(*program.read_by_branch(request).items(), strict=True)
    contexts = reader.read([Reading(own) for _ in range(count) for own in parts])
    numbers = range(0, len(contexts), len(kinds))
    return [dict(zip(kinds, contexts[n : n + len(kinds)], strict=True)) for n in numbers]


def test_a_group_and_its_branches_hold_the_prompt_once(model, mixed_requests):
    """The text-unconditional branch is the conditional one without its end: it holds nothing more."""
    request = mixed_requests[2]
    group = read_group(model, request, run_tokens=1, count=24)
    assert len({own["conditional"] for own in group}) == 1
    held = {
        segment.key_NLKD.untyped_storage().data_ptr(): segment.key_NLKD.untyped_storage().nbytes()
        for own in group
        for context in own.values()
        for segment in context.segments
    }
    conditional, without_text, texts = (group[0][kind] for kind in ("conditional", "text", "image"))
    assert conditional.runs == without_text.runs
    token_bytes = conditional.segments[0].key_NLKD.nbytes // conditional.segments[0].length
    assert sum(held.values()) == token_bytes * (conditional.length + texts.length)


@pytest.mark.parametrize("run_tokens", [1, 10**9])
def test_texts_that_wait_for_a_place_are_the_same(model, mixed_requests, run_tokens):
    """Rows of several prompts and lengths, in as many places as fit, down to one."""
    requests = [mixed_requests[number] for number in (1, 2, 4, 5)]
    contexts = [read_group(model, request, run_tokens, 1)[0]["conditional"] for request in requests]
    contexts = [context for context in contexts for _ in range(3)]
    settings = [
        TextSettings(3 + 5 * (number % 4), temperature=number % 3 / 2, top_p=1 - number % 2 / 5)
        for number in range(12)
    ]
    keys = [NoiseKey(n, f"{n}", stream="text") for n in range(12)]
    together = decode_text(model, contexts, settings, keys)
    size = max(map(slot_size, contexts, settings))
    for max_tokens in (1, 3 * size, 5 * size + 1):
        for ours, theirs in zip(
            decode_text(model, contexts, settings, keys, max_tokens), together, strict=True
        ):
            assert (ours.turn, ours.rest) == (theirs.turn, theirs.rest)
            assert torch.equal(ours.context.key(0), theirs.context.key(0))
            assert torch.equal(ours.context.value(-1), theirs.context.value(-1))


def test_what_is_kept_of_a_sample_holds_nothing_of_its_neighbours(model, mixed_requests):
    engine = Engine(model, PROGRAMS, prepare=crop_picture, keep_steps=True)
    for sample in engine.run(mixed_requests):
        for latent_LC in (sample.trajectory.latent_LC, *sample.trajectory.steps):
            assert latent_LC.untyped_storage().nbytes() == latent_LC.nbytes
