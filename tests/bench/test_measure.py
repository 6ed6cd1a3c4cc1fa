"""A case on a device, with the host's clock in place of the device's."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from functools import partial

import pytest
import torch

from bench import measure
from bench.case import PLAIN, Op, Shape
from bench.measure import COMPILED, Compiled, Task, Timing, make_rows, measure_case
from bench.registry import OPS
from bench.rows import GpuRow, Spread
from tests.bench.fakes import WallTimer, make_case

SHAPE = Shape({"L": 5, "E": 6})
TASK = Task("swiglu", SHAPE)


@pytest.fixture(autouse=True)
def compile_without_code(monkeypatch):
    """torch.compile, but what it traces runs as it is: nothing waits for a compiler."""
    monkeypatch.setattr(measure.torch, "compile", partial(torch.compile, backend="eager"))


def replace_swiglu(monkeypatch, case):
    monkeypatch.setitem(OPS, "swiglu", Op(lambda shape, device: case, [SHAPE], [SHAPE]))


def test_a_case_has_the_times_of_all_its_runs():
    steps = []
    measured = measure_case(TASK, WallTimer(), steps.append)
    assert set(measured.timings) >= {PLAIN, "reference", COMPILED}
    assert steps[:2] == ["build", COMPILED]
    assert set(steps) == {"build", *measured.timings}
    assert measured.notes == []
    # 360 bytes a set; the clock's cache is said to hold 2,000
    assert measured.input_sets == -(-4000 // measured.num_bytes)


def test_rows_say_everything():
    measured = measure_case(TASK, WallTimer(), [].append)
    rows = make_rows(TASK, measured, "abc")
    assert [row.impl for row in rows] == list(measured.timings)
    for row in rows:
        line = json.loads(json.dumps(asdict(row)))
        assert set(line) == {field.name for field in fields(GpuRow)}
        assert GpuRow(**line) == row
        assert (row.op, row.shape, row.dtype, row.commit) == ("swiglu", "L5 E6", "float32", "abc")
        assert (row.gpu, row.driver, row.triton) == ("a chip", "580.1", "3.7.1")
        assert row.copy_share == pytest.approx(row.gb_per_s / 4000, abs=1e-4)
        assert set(row.times_faster) >= {PLAIN, COMPILED}


def test_rates_of_matrix_products():
    measured = replace(measure_case(TASK, WallTimer(), [].append), num_flops=10**9)
    for row in make_rows(TASK, measured, "abc"):
        assert row.tflop_per_s == pytest.approx(1e9 / row.median_us / 1e6, rel=0.02)


def test_a_replayed_run_is_compared_with_a_called_one_by_their_calls():
    timings = {
        "torch": Timing(Spread(50.0, 50.0, 50.0), 50.0, "events", 0),
        "torch.compile": Timing(Spread(4.0, 4.0, 4.0), 30.0, "graph", 1),
        "triton": Timing(Spread(2.0, 2.0, 2.0), 10.0, "graph", 1),
    }
    assert measure.compare(timings["triton"], timings) == {"torch": 5.0, "torch.compile": 2.0}


def test_a_run_that_failed_before_is_left_out():
    measured = measure_case(replace(TASK, without=frozenset({"reference", COMPILED})), WallTimer(), [].append)
    assert not {"reference", COMPILED} & set(measured.timings)
    assert PLAIN in measured.timings


def test_wrong_numbers_of_ours_have_no_times(monkeypatch):
    replace_swiglu(monkeypatch, make_case(torch=torch.ones(3), triton=torch.zeros(3)))
    with pytest.raises(ValueError, match=r"triton differs from plain torch by 1\.0e\+00"):
        measure_case(TASK, WallTimer(), [].append)


def test_wrong_numbers_of_a_library_are_told(monkeypatch):
    replace_swiglu(monkeypatch, make_case(torch=torch.ones(3), triton=torch.ones(3), liger=torch.zeros(3)))
    measured = measure_case(TASK, WallTimer(), [].append)
    assert set(measured.timings) == {PLAIN, "triton", COMPILED}
    assert "liger left out" in measured.notes[0]


def test_what_cannot_be_compiled_is_told(monkeypatch):
    def unsteady():
        torch._dynamo.graph_break()
        return torch.ones(3)

    case = make_case(torch=torch.ones(3))
    case.runs[PLAIN] = unsteady
    replace_swiglu(monkeypatch, case)
    measured = measure_case(TASK, WallTimer(), [].append)
    assert set(measured.timings) == {PLAIN}
    assert measured.notes[0].startswith("torch.compile left out: ")
    assert isinstance(measure.compile_case(TASK, WallTimer(), [].append), Compiled)
