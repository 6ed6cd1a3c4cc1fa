"""A stream of requests: every sample once, whatever goes on at a time; lazily, and memory is flat."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections import Counter
from dataclasses import replace
from time import monotonic

import pytest
import torch
from PIL import Image

from realign.api import Generator
from realign.reasoning.programs import PROGRAMS
from realign.runtime import reader, stages
from realign.runtime.engine import Engine
from realign.runtime.prepare import crop_picture
from realign.runtime.request import Prompt, Request
from realign.runtime.settings import GuidanceSettings, Settings, TextSettings
from realign.runtime.stream import Stream, StreamOptions

from .conftest import draw_picture

SMALL = Settings(16, 16, num_timesteps=3)


def check_equal(samples, others):
    """The same requests, texts and pictures, and latents to the last bit."""
    others = {other.request.id: other for other in others}
    assert Counter(sample.request.id for sample in samples) == Counter(others.keys())
    for sample in samples:
        other = others[sample.request.id]
        assert sample.reasoning == other.reasoning
        assert sample.trajectory.text_turns == other.trajectory.text_turns
        assert torch.equal(sample.trajectory.latent_LC, other.trajectory.latent_LC)
        assert sample.image.tobytes() == other.image.tobytes()


@pytest.fixture
def many_requests(mixed_requests):
    """Three of each kind, with prompts in common."""
    return [replace(request, id=f"{request.id}, {n}", seed=n) for n in range(3) for request in mixed_requests]


@pytest.fixture
def alone(engine, many_requests):
    return [sample for request in many_requests for sample in engine.run([request])]


def test_streamed_or_run_or_one_by_one(engine, many_requests, alone, poison_fresh_memory):
    check_equal(engine.run(many_requests), alone)
    check_equal(list(engine.stream(many_requests)), alone)


@pytest.mark.parametrize("seed", range(4))
def test_in_any_order_window_and_budget(model, many_requests, alone, seed, poison_fresh_memory):
    rng = random.Random(seed)
    shuffled = rng.sample(many_requests, len(many_requests))
    memory = rng.choice([1, 400_000, 3_000_000, None])
    window, size = rng.choice([1, 2, 5, 21]), rng.choice([None, 1, 2, 4])
    options = StreamOptions(
        window, size, rng.choice([1, 50_000, 1e9]), rng.choice([0, 3]), rng.choice([0, 9])
    )
    engine = Engine(model, PROGRAMS, prepare=crop_picture, memory_bytes=memory)
    check_equal(list(engine.stream(iter(shuffled), options)), alone)


def test_samples_come_before_the_last_request_is_taken(engine):
    taken = []

    def endless():
        while True:
            taken.append(Request(str(len(taken)), Prompt.build("a mug"), settings=SMALL))
            yield taken[-1]

    stream = engine.stream(endless(), StreamOptions(window=4, ahead=3))
    found = {next(stream).request.id for _ in range(12)}
    assert found == {str(number) for number in range(12)}
    assert len(taken) <= 12 + 4 + 3
    before = threading.active_count()
    stream.close()
    assert threading.active_count() == before - 1


def test_a_stream_that_was_never_read_takes_nothing(engine):
    taken = []
    stream = engine.stream(map(taken.append, [1, 2, 3]))
    stream.close()
    assert taken == []


def test_errors_come_where_the_request_is_met(engine):
    def fail_at_third():
        for number in range(2):
            yield Request(str(number), Prompt.build("a mug"), settings=SMALL)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(engine.stream(fail_at_third()))
    bad = Request("bad", Prompt.build("a mug"), settings=replace(SMALL, height=20))
    good = replace(bad, id="good", settings=SMALL)
    stream = engine.stream([good, bad], StreamOptions(window=1))
    assert next(stream).request.id == "good"
    with pytest.raises(ValueError, match="request 'bad': height 20"):
        next(stream)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("realign")]


def spy(monkeypatch, owner, name, note):
    """Lets `note` see what a function is called with."""
    function = getattr(owner, name)

    def call(*args):
        note(*args)
        return function(*args)

    monkeypatch.setattr(owner, name, call)


def test_what_prompts_share_is_read_once_in_a_window(engine, monkeypatch):
    read = []
    spy(monkeypatch, reader, "extend", lambda model, contexts, blocks, *rest: read.extend(blocks))
    settings = replace(SMALL, guidance=GuidanceSettings(1.0))
    pictures = [draw_picture(number, 16, 16) for number in range(2)]
    requests = [
        Request(str(number), Prompt.build([pictures[number % 2], f"a mug, {number % 4}"]), settings=settings)
        for number in range(16)
    ]
    assert len(list(engine.stream(requests, StreamOptions(batch_size=8, patience=60)))) == 16
    assert len(read) == 2 * 2 + 4  # two blocks a picture, four texts


def test_packs_are_even_and_full(engine, monkeypatch):
    packs = []
    spy(monkeypatch, stages, "denoise", lambda model, jobs, *rest: packs.append(jobs))
    settings = [replace(SMALL, num_timesteps=3 + number % 2) for number in range(24)]
    requests = [Request(str(n), Prompt.build("mug"), settings=own) for n, own in enumerate(settings)]
    assert len(list(engine.stream(requests, StreamOptions(window=16, batch_size=4, patience=60)))) == 24
    assert [len(pack) for pack in packs] == [4] * 6
    assert sum(len({job.schedule.num_steps for job in pack}) == 1 for pack in packs) >= 5


@pytest.mark.parametrize(
    ("name", "least"),
    [("window", 1), ("batch_size", 1), ("picture_bytes", 0), ("ahead", 0), ("patience", 0)],
)
def test_a_bound_that_admits_nothing_is_refused(name, least):
    for value in (least - 1, float("nan")):
        with pytest.raises(ValueError, match=f"{name} is {value}: must be at least {least}"):
            StreamOptions(**{name: value})


def test_a_request_may_wait_for_another_ones_sample(engine):
    sample_is_there = threading.Event()

    def live():
        yield Request("0", Prompt.build("a mug"), settings=SMALL)
        assert sample_is_there.wait(60), "the stream waits for a request though it has work"
        yield Request("1", Prompt.build("a lamp"), settings=SMALL)

    names = []
    for sample in engine.stream(live()):
        names.append(sample.request.id)
        sample_is_there.set()
    assert names == ["0", "1"]


def test_control_comes_back_while_the_source_waits(engine):
    go_on = threading.Event()

    def live():
        yield Request("0", Prompt.build("a mug"), settings=SMALL)
        go_on.wait(60)

    stream = engine.stream(live())
    next(stream)
    began = monotonic()
    stream.close()
    assert monotonic() - began < 30
    go_on.set()


def test_no_sample_is_held_once_it_was_given(engine):
    samples = []
    requests = [Request(str(number), Prompt.build("a mug"), settings=SMALL) for number in range(4)]
    for sample in engine.stream(requests, StreamOptions(patience=60)):
        samples.append(weakref.ref(sample))
        del sample
        gc.collect()
        # the engine's own frame may hold the last
        assert [ref() is not None for ref in samples[:-1]] == [False] * (len(samples) - 1)


def test_what_is_no_operation_is_refused(model):
    def program(request):
        yield "a picture"

    engine = Engine(model, {"none": program})
    with pytest.raises(TypeError, match="program of request '0' asks for 'a picture': must be a Read"):
        engine.run([Request("0", Prompt.build("a mug"), settings=SMALL)])


def test_a_program_that_asks_for_nothing(model):
    def program(request):
        return request.id
        yield

    engine = Engine(model, {"none": program})
    requests = [Request(str(number), Prompt.build("a mug"), settings=SMALL) for number in range(3)]
    assert engine.run(requests, StreamOptions(window=1)) == ["0", "1", "2"]


def test_generator_streams_what_it_generates(model):
    generator = Generator(model)
    options = {"height": 16, "width": 16, "steps": 3, "num_images": 2}
    prompts = ["a mug", "a lamp", "a cup"]
    streamed = generator.stream((prompt for prompt in prompts), **options)
    check_equal(list(streamed), generator.generate(prompts, **options))
    with pytest.raises(ValueError, match="seed is -1"):
        generator.stream(prompts, seed=-1)
    with pytest.raises(ValueError, match="prompt 1: a text of the prompt is empty"):
        list(generator.stream(["a mug", " "], **options))


def count_live_bytes():
    """Of tensors by their exact types: other tests leave fake ones behind, which have no memory."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_is_flat_over_a_long_run(model, monkeypatch):
    """Every request has a picture and a prompt of its own: whatever stays of one would add up.

    The thread that goes ahead rests while memory is counted: no tuple that it is building may be looked at.
    """
    at_work, meet = threading.Lock(), Stream._meet

    def meet_alone(stream, request):
        with at_work:
            return meet(stream, request)

    monkeypatch.setattr(Stream, "_meet", meet_alone)

    def build_request(n):
        mode = ("none", "ic-cot", "think")[n % 3]
        settings = Settings(16, 16 + 8 * (n % 2), mode, 2, text=TextSettings(4, temperature=1.0))
        with at_work:
            return Request(str(n), Prompt.build([draw_picture(n, 24, 24), f"mug number {n}"]), n, settings)

    engine = Engine(model, PROGRAMS, prepare=crop_picture)
    before, counts = count_live_bytes(), []
    for number, _ in enumerate(engine.stream(map(build_request, range(200)), StreamOptions(window=20))):
        if number % 20 == 19:
            with at_work:
                counts.append(count_live_bytes() - before)
    one = counts[1] / 40
    assert max(counts[5:]) < max(counts[:5]) + 5 * one
    assert count_live_bytes() - before < 5 * one


@pytest.mark.parametrize(("picture_bytes", "most"), [(0, 1), (64 * 64 * 3 + 1, 2)])
def test_pictures_that_are_held_are_bounded(engine, picture_bytes, most):
    """Of the window and ahead of it; one request is always taken."""
    taken = []

    def requests():
        for n in range(6):
            taken.append(n)
            prompt = Prompt.build([Image.new("RGB", (64, 64), (n, 0, 0)), "a mug"])
            yield Request(str(n), prompt, settings=SMALL)

    order = []
    for sample in engine.stream(requests(), StreamOptions(picture_bytes=picture_bytes)):
        order.append(int(sample.request.id))
        assert len(taken) <= len(order) + most
    assert order == [0, 1, 2, 3, 4, 5]
