"""What `bench.check` says: figures with their bounds, and a bad exit code for a broken promise."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from bench import check
from bench.check import Figure, Place, main
from realign.runtime import graphs

CPU = torch.device("cpu")


def test_a_cpu_keeps_all_promises_in_float32(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    names = ["independence", "ratio", "commands"]
    assert main(["--dtype", "float32", "--check", *names, "--out", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["check"] for row in rows] == ["independence"] * 4 + ["ratio"] * 4 + ["commands"] * 2
    assert all(row["bound"] is not None and row["measured"] <= row["bound"] for row in rows)
    assert capsys.readouterr().out.count("  ok") == 10


def test_a_broken_promise_is_said_and_is_an_exit_code(tmp_path, capsys, monkeypatch):
    figures = [Figure("kept", 1.0, 1.0), Figure("broken", 2.0, 1.0), Figure("only said", 9.0)]
    monkeypatch.setitem(check.CHECKS, "parity", lambda place: iter(figures))
    assert main(["--dtype", "float32", "--check", "parity", "--out", str(tmp_path / "rows.jsonl")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["ok", "BROKEN", "promised)"]


def test_samples_that_depend_on_their_neighbours_are_found(monkeypatch):
    """An engine that draws each call from another seed."""
    calls = iter(range(100))

    class Careless(check.Engine):
        def run(self, requests):
            seed = next(calls)
            return super().run([check.replace(request, seed=seed) for request in requests])

    monkeypatch.setattr(check, "Engine", Careless)
    figures = list(check.check_independence(Place(CPU, "float32", "mini")))
    assert [figure.is_kept for figure in figures if figure.what.startswith("latents")] == [False, False]


def test_recorded_steps_are_compared_with_launched_ones(monkeypatch):
    """A device that records: here nothing can be captured, so that only which way is taken shows."""
    ways = []

    def call(step):
        ways.append(step.is_captured)
        step.graph = "recorded" if step.is_captured and replays else None
        return step.function()

    monkeypatch.setattr(graphs, "CAPTURED_DEVICES", ("cpu",))
    monkeypatch.setattr(graphs.CapturedStep, "__call__", call)
    place = Place(CPU, "float32", "mini")
    replays = True
    figures = list(check.check_graphs(place))
    assert [figure.measured for figure in figures] == [0.0] * 9
    num_launched = ways.index(True)
    assert not any(ways[:num_launched])
    assert any(ways[num_launched:])
    replays = False
    assert [figure.is_kept for figure in check.check_graphs(place)] == [True, True, False] * 3
    assert list(check.check_memory(place)) == []


def test_what_is_no_number_is_kept_by_nothing():
    """Whichever comes first: `max` would lose it."""
    cases = [SimpleNamespace(max_error=error, tolerance=1e-4) for error in (1e-5, math.nan, 2e-5)]
    assert not Figure("parity", check.max_share(cases), 1.0).is_kept
    good, bad = (make_sample(value) for value in (1.0, math.nan))
    for pair in ([good, bad], [bad, good]):
        assert math.isnan(check.compare(pair, pair)[1])
    assert check.compare([good], [good]) == (0.0, 0.0)


def make_sample(value: float) -> SimpleNamespace:
    trajectory = SimpleNamespace(text_turns=(), latent_LC=torch.full((2, 3), value))
    return SimpleNamespace(request=SimpleNamespace(id=str(value)), trajectory=trajectory)


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_here_is_refused(device, capsys):
    assert main(["--device", device]) == 2
    assert f"device {device!r} cannot be used here" in capsys.readouterr().err
