"""Captured steps: what is run when; and that the steps of the runtime can be captured."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from realign.reasoning.programs import PROGRAMS
from realign.runtime import sampler
from realign.runtime.context import build_text_block, extend
from realign.runtime.engine import Engine
from realign.runtime.graphs import CapturedStep
from realign.runtime.kv import Context
from realign.runtime.noise import NoiseKey
from realign.runtime.prepare import crop_picture
from realign.runtime.settings import TextSettings
from realign.runtime.text import _Row, _Writer, decode_text
from tests.runtime.test_sampler import contexts, jobs  # noqa: F401, fixtures

CPU = torch.device("cpu")


class RecordedGraph:
    """What a CUDA graph does, on a CPU: every operation of a recording, again on the same tensors.

    A recording changes nothing: what was written while it was made is put back.
    """

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def replay(self) -> None:
        for function, args, kwargs, results in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for new, old in zip(again, results, strict=True):
                if isinstance(new, torch.Tensor) and new is not old:
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            self._save(argument, value)
        for argument in function._schema.arguments:
            self._save(argument, kwargs.get(argument.name))
        result = function(*args, **kwargs)
        if not is_view(result, (args, kwargs)):
            self.graph.calls.append((function, args, kwargs, tree_leaves(result)))
        return result

    def _save(self, argument, value) -> None:
        if isinstance(value, torch.Tensor) and argument.alias_info and argument.alias_info.is_write:
            self.before.setdefault(id(value), (value, value.clone()))

    def restore(self) -> None:
        for tensor, before in reversed(self.before.values()):
            tensor.copy_(before)


def is_view(result, arguments) -> bool:
    """Whether it is another tensor in the memory of an argument: it is there already when a replay begins."""
    given = [value for value in tree_leaves(arguments) if isinstance(value, torch.Tensor)]
    return (
        isinstance(result, torch.Tensor)
        and all(result is not value for value in given)
        and result.untyped_storage().data_ptr() in {value.untyped_storage().data_ptr() for value in given}
    )


@pytest.fixture
def recorded_graphs(monkeypatch):
    """Steps are captured on this device; the graphs are given back."""
    graphs = []

    @contextlib.contextmanager
    def record(graph, capture_error_mode):
        assert capture_error_mode == "thread_local"
        graphs.append(graph)
        with Recorder(graph) as recorder:
            yield
        recorder.restore()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr("realign.runtime.graphs.CAPTURED_DEVICES", ("cpu",))
    monkeypatch.setattr("realign.runtime.text.STEPS_AT_ONCE", {"cpu": 4})
    monkeypatch.setattr("realign.runtime.text.STEPS_BEFORE", 2)
    return graphs


def test_every_call_is_one_step_and_the_third_runs_no_python(recorded_graphs):
    count, calls = torch.zeros(1), []

    def step():
        calls.append(1)
        return count.add_(1) * 10

    captured = CapturedStep(step, CPU)
    assert [captured().item() for _ in range(5)] == [10, 20, 30, 40, 50]
    assert len(calls) == 2


@pytest.mark.parametrize(("device", "is_worth"), [(torch.device("meta"), True), (CPU, False)])
def test_elsewhere_it_is_the_function(recorded_graphs, device, is_worth):
    captured = CapturedStep(lambda: recorded_graphs, device, is_worth)
    assert [captured() for _ in range(3)] == [[]] * 3


@pytest.mark.parametrize("run_tokens", [1, 10**9])
def test_samples_are_the_same(model, mixed_requests, recorded_graphs, monkeypatch, run_tokens):
    """Both loops: sizes, schedules and guidance that differ, texts of several lengths, rows that end."""
    engine = Engine(model, PROGRAMS, prepare=crop_picture, attention="reference", run_tokens=run_tokens)
    captured = engine.run(mixed_requests)
    assert len(recorded_graphs) >= 2
    monkeypatch.setattr("realign.runtime.graphs.CAPTURED_DEVICES", ())
    monkeypatch.setattr("realign.runtime.text.STEPS_AT_ONCE", {"cpu": 1})
    for ours, theirs in zip(captured, engine.run(mixed_requests), strict=True):
        assert ours.trajectory.text_turns == theirs.trajectory.text_turns
        assert torch.equal(ours.trajectory.latent_LC, theirs.trajectory.latent_LC)


@pytest.mark.parametrize("max_tokens", [None, 400, 1])
def test_texts_are_the_same_where_places_are_refilled(model, recorded_graphs, monkeypatch, max_tokens):
    (context,) = extend(model, [Context()], [build_text_block(model, "a red mug")])
    starts = [context, Context()] * 4
    # The first are greedy, all that take their places are not.
    settings = [TextSettings(5 + 7 * (n % 3), temperature=n > 3, top_p=1 - (n > 5) / 10) for n in range(8)]
    keys = [NoiseKey(n, f"{n}", stream="text") for n in range(8)]
    captured = decode_text(model, starts, settings, keys, max_tokens)
    monkeypatch.setattr("realign.runtime.graphs.CAPTURED_DEVICES", ())
    plain = decode_text(model, starts, settings, keys)
    assert [one.turn for one in captured] == [one.turn for one in plain]
    for ours, theirs in zip(captured, plain, strict=True):
        assert torch.equal(ours.context.key(-1), theirs.context.key(-1))


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
    writer = _Writer(model, rows, None, None, record=False)
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
