"""The command where memory is short: it goes on with less, or says what to lower; and saving in a thread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from realign.cli import writer as writers
from realign.cli.generate import PreparedRun
from realign.cli.writer import Writer
from tests.cli.quick import snapshot
from tests.cli.support import Workplace, read_pictures

HALVED = "half as much at a time from here on"


def limit_forwards(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The model that is loaded cannot take more than `most` tokens in a forward."""
    load = PreparedRun.load_engine

    def load_limited(self: PreparedRun) -> object:
        engine = load(self)
        forward = engine.model.decoder.forward

        def limited(hidden_LE: torch.Tensor, *rest: object) -> torch.Tensor:
            if len(hidden_LE) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return forward(hidden_LE, *rest)

        engine.model.decoder.forward = limited
        return engine

    monkeypatch.setattr(PreparedRun, "load_engine", load_limited)


def test_out_of_memory_halves_and_goes_on(
    place: Workplace, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--num-images", 3, "--height", 16, "--width", 16)
    undisturbed = place.folder / "undisturbed"
    assert place.generate(mixed, *arguments, "--out", undisturbed).code == 0
    limit_forwards(monkeypatch, 60)
    outcome = place.generate(mixed, *arguments)
    assert outcome.code == 0
    said = [line for line in outcome.err.splitlines() if HALVED in line]
    assert said
    assert all(line.startswith("realign: out of memory while ") for line in said)
    assert snapshot(place.out) == snapshot(undisturbed)


def test_what_does_not_fit_by_itself_is_said_and_the_rest_is_kept(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt comes last and cannot be read; all before it is there, and later the run goes on."""
    rows = [{"id": f"p{number}", "prompt": "a mug"} for number in range(4)]
    prompts = place.write_prompts(*rows, {"id": "long", "prompt": "a mug and a lamp " * 20})
    arguments = ("--height", 16, "--width", 16, "--batch-size", 1)
    with monkeypatch.context() as limited:
        limit_forwards(limited, 60)
        outcome = place.generate(prompts, *arguments)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "realign: error: too little memory for reading request 'long/0' by itself: make its picture or its "
        f"references smaller, or free memory; what is done is in {place.out}; "
        "run the same command again to go on"
    )
    num_kept = len(read_pictures(place.out))
    outcome = place.generate(prompts, *arguments)
    assert outcome.code == 0
    assert outcome.out.startswith(f"5 pictures ({5 - num_kept} new)")


def test_any_memory_gives_the_same_pictures(place: Workplace, mixed: Path) -> None:
    outs = []
    for number, arguments in enumerate(
        [(), ("--memory-gb", 0.001), ("--memory-gb", 1e-9, "--batch-size", 3)]
    ):
        outs.append(place.folder / str(number))
        assert place.generate(mixed, "--num-images", 2, *arguments, "--out", outs[-1]).code == 0
    assert snapshot(outs[0]) == snapshot(outs[1]) == snapshot(outs[2])


@pytest.mark.parametrize("memory", [0, -1, "nan", "inf"])
def test_a_memory_that_cannot_be_is_refused(place: Workplace, mixed: Path, memory: object) -> None:
    outcome = place.generate(mixed, "--memory-gb", memory)
    assert outcome.code == 2
    assert outcome.err.startswith("realign: error: --memory-gb ")
    assert outcome.err.count("\n") == 1


def test_items_are_saved_in_order_in_another_thread() -> None:
    saved = []
    with Writer(lambda item: saved.append((item, threading.get_ident()))) as writer:
        for item in range(100):
            writer.put(item)
        writer.flush()
        assert len(saved) == 100
        writer.put(100)
    assert [item for item, _ in saved] == list(range(101))
    assert {ident for _, ident in saved} != {threading.get_ident()}


def test_after_an_error_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "DEPTH", 3)
    saved = []

    def save(item: int) -> None:
        if item == 5:
            raise OSError(28, "No space left on device")
        saved.append(item)

    def put_many() -> None:
        with Writer(save) as writer:
            for item in range(1000):
                writer.put(item)

    with pytest.raises(OSError, match="No space left"):
        put_many()
    assert saved == [0, 1, 2, 3, 4]


def test_an_interrupted_run_saves_what_was_made() -> None:
    saved, begun = [], threading.Event()

    def save(item: int) -> None:
        begun.wait(60)
        saved.append(item)

    def be_interrupted() -> None:
        with Writer(save) as writer:
            for item in range(7):
                writer.put(item)
            begun.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert saved == list(range(7))
