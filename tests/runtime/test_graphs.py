"""Captured steps: what is run when; and that the steps of the runtime can be captured."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from realign.runtime import sampler
from realign.runtime.graphs import CapturedStep
from realign.runtime.kv import Context
from realign.runtime.noise import NoiseKey
from realign.runtime.settings import TextSettings
from realign.runtime.text import _Row, _Writer
from tests.runtime.test_sampler import contexts, jobs  # noqa: F401, fixtures

CUDA = torch.device("cuda")


class FakeGraph:
    """A graph that does what was recorded, as CUDA's does: nothing while it is recorded."""

    recording: FakeGraph | None = None

    def __init__(self) -> None:
        self.recorded: list = []

    def replay(self) -> None:
        for work in self.recorded:
            work()


@pytest.fixture
def fake_graphs(monkeypatch):
    @contextlib.contextmanager
    def record(graph):
        FakeGraph.recording = graph
        yield
        FakeGraph.recording = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)


def build_counter():
    """A step that adds one to what it returns; `calls` counts how often Python ran it."""
    count, calls = torch.zeros(1), []

    def step():
        calls.append(1)
        if FakeGraph.recording:
            FakeGraph.recording.recorded.append(lambda: count.add_(1))
        else:
            count.add_(1)
        return count

    return step, calls


def test_every_call_is_one_step_and_the_third_runs_no_python(fake_graphs):
    step, calls = build_counter()
    captured = CapturedStep(step, CUDA)
    assert [captured().item() for _ in range(5)] == [1, 2, 3, 4, 5]
    assert len(calls) == 2


@pytest.mark.parametrize(("device", "is_worth"), [(torch.device("cpu"), True), (CUDA, False)])
def test_elsewhere_it_is_the_function(fake_graphs, device, is_worth):
    step, calls = build_counter()
    captured = CapturedStep(step, device, is_worth)
    assert [captured().item() for _ in range(3)] == [1, 2, 3]
    assert len(calls) == 3


class HostTalk(TorchDispatchMode):
    """Notes operations that a recording cannot hold: values read by the host, tensors made from its values,
    and shapes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "repeat_interleave.Tensor", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if name.startswith(self.FORBIDDEN):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The ops look at the values of their arguments where the host has them; on a GPU it has not."""
    for name, module in list(sys.modules.items()):
        if name.startswith("realign_kernels.") and hasattr(module, "can_read_values"):
            monkeypatch.setattr(module, "can_read_values", lambda tensor: False)


def test_the_probe_finds_what_it_looks_for():
    values = torch.arange(3)
    with HostTalk() as talk:
        values[0].item()
        values.nonzero()
        torch.tensor([1.0])
    assert [name.partition(".")[0] for name in talk.found] == ["_local_scalar_dense", "nonzero", "lift_fresh"]


@torch.no_grad()
def test_a_text_step_talks_to_nobody(model, as_on_a_gpu):
    settings = [TextSettings(9), TextSettings(9, temperature=1.0, top_p=0.9)]
    rows = [_Row(Context(), own, NoiseKey(0, "", stream="text")) for own in settings]
    writer = _Writer(model, rows, None, None)
    writer.step()
    with HostTalk() as talk:
        writer.step()
    assert talk.found == []


def test_a_denoising_step_talks_to_nobody(model, jobs, as_on_a_gpu, monkeypatch):  # noqa: F811
    """But where the set of running branches changes, and what a step consists of is laid out anew."""
    quiet = []

    class Watched(sampler._Phase):
        def _run(self):
            with HostTalk() as talk:
                result = super()._run()
            quiet.append(talk.found)
            return result

    monkeypatch.setattr(sampler, "_Phase", Watched)
    sampler.denoise(model, jobs)
    assert len(quiet) >= 4
    assert all(found == [] for found in quiet), quiet
