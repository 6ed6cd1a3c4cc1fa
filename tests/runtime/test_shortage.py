"""Memory that runs out on the way: less at a time from then on, the same samples, nothing lost or twice."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace

import pytest
import torch

from realign.reasoning.programs import PROGRAMS
from realign.runtime import stages
from realign.runtime.budget import MemoryShortage
from realign.runtime.engine import Engine
from realign.runtime.prepare import crop_picture
from realign.runtime.stream import StreamOptions
from realign.runtime.text import slot_size

from .test_stream import check_equal, spy

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory"),
    "python": MemoryError(),
}


@pytest.fixture
def many_requests(mixed_requests):
    return [replace(request, id=f"{request.id}, {n}", seed=n) for n in range(3) for request in mixed_requests]


@pytest.fixture
def undisturbed(engine, many_requests):
    return engine.run(many_requests)


@pytest.fixture
def enough(model, engine, mixed_requests):
    """Tokens of the largest forward of any request by itself."""
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        spy(patch, model.decoder, "forward", lambda hidden_LE, *rest: sizes.append(len(hidden_LE)))
        for request in mixed_requests:
            engine.run([request])
    return max(sizes)


@pytest.fixture
def small(model):
    """An engine that says what it reports."""
    engine = Engine(model, PROGRAMS, prepare=crop_picture)
    engine.said = []
    engine.report = engine.said.append
    return engine


def limit_decoder(model, monkeypatch, most, error):
    """Every forward of more tokens than `most` fails, in its middle, holding a tensor; gives those."""
    forward, held = model.decoder.forward, []

    def limited(hidden_LE, *rest, **others):
        assert not [tensor for tensor in held if tensor() is not None], "a failed call still holds memory"
        if len(hidden_LE) > most:
            large = torch.empty(1000)
            held.append(weakref.ref(large))
            raise type(error)(*error.args)
        return forward(hidden_LE, *rest, **others)

    monkeypatch.setattr(model.decoder, "forward", limited)
    return held


@pytest.mark.parametrize("kind", ERRORS)
def test_packs_are_halved_and_the_run_goes_on(
    model, small, enough, many_requests, undisturbed, monkeypatch, kind
):
    held = limit_decoder(model, monkeypatch, enough, ERRORS[kind])
    check_equal(list(small.stream(many_requests)), undisturbed)
    assert len(held) == len(small.said) >= 2
    assert len(set(small.said)) == len(small.said)  # who shows each text once shows all
    said = (
        r"out of memory while (reading|drawing): half as much at a time from here on, at most [\d.e+-]+ MiB"
    )
    assert all(re.fullmatch(said, line) for line in small.said)


def test_the_lowered_budget_sticks(model, small, enough, many_requests, undisturbed, monkeypatch):
    held = limit_decoder(model, monkeypatch, enough, ERRORS["cuda"])
    small.run(many_requests)
    num_failed = len(held)
    check_equal(small.run(many_requests), undisturbed)
    assert len(held) == num_failed


@pytest.mark.parametrize("name", ["decode_text", "decode_pictures"])
def test_writing_and_decoding_are_halved_too(small, many_requests, undisturbed, monkeypatch, name):
    work, sizes = getattr(stages, name), []

    def count_rows(items, rest):
        if name == "decode_pictures":
            return len(items)
        settings, _, max_tokens, *_ = rest
        return min(len(items), max_tokens // max(map(slot_size, items, settings)))

    def limited(model, items, *rest):
        sizes.append(count_rows(items, rest))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(model, items, *rest)

    monkeypatch.setattr(stages, name, limited)
    check_equal(list(small.stream(many_requests)), undisturbed)
    assert len(small.said) == sum(size > 2 for size in sizes)
    assert sizes[0] > 4


def test_one_request_that_does_not_fit_is_an_error(model, small, many_requests, monkeypatch):
    limit_decoder(model, monkeypatch, 20, ERRORS["cuda"])
    said = r"too little memory for (reading|drawing) request 'request \d, \d' by itself: make its picture"
    with pytest.raises(MemoryShortage, match=said):
        list(small.stream(many_requests))
    monkeypatch.undo()
    assert len(list(small.stream(many_requests))) == len(many_requests)


def test_other_errors_are_not_taken_for_it(model, small, many_requests, monkeypatch):
    limit_decoder(model, monkeypatch, 20, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(small.stream(many_requests))
    assert small.said == []


def test_what_others_hold_is_freed_for_one_that_cannot_be_cut(small, many_requests, undisturbed, monkeypatch):
    """Drawing fails as long as contexts of more than one request are held: the others begin again."""
    denoise, readers = stages.denoise, []
    spy(monkeypatch, stages.ReadStage, "__init__", lambda *args: readers.append(args[-1]))

    def limited(model, jobs, *rest):
        gc.collect()
        own = {segment for job in jobs for b in job.branches for segment in b.context.segments}
        if readers[-1].count_held() > sum(segment.length for segment in own) + 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return denoise(model, jobs, *rest)

    monkeypatch.setattr(stages, "denoise", limited)
    small.memory_bytes = 2_000_000
    check_equal(list(small.stream(many_requests, StreamOptions(window=8, batch_size=1))), undisturbed)
    assert small.said
