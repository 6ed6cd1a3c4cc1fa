"""The bench measures right numbers only, and writes rows that can be read again."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch

from bench import __main__ as command
from bench.measure import Row, check_case, measure_op
from bench.registry import OPS, PLAIN, Case, Op, Shape

SMALL = {
    "guided_flow_step": Shape({"B": 2, "L": 5, "C": 6}),
    "guided_velocity": Shape({"B": 2, "L": 5, "C": 6}, torch.bfloat16),
    "flow_step": Shape({"B": 2, "L": 5, "C": 6}),
    "rms_norm": Shape({"L": 5, "E": 6}, torch.bfloat16),
    "apply_rope": Shape({"L": 5, "H": 2, "D": 6}),
    "swiglu": Shape({"L": 5, "E": 6}),
}


@pytest.mark.parametrize("op", list(OPS))
def test_every_op_can_be_measured(op):
    rows = measure_op(op, SMALL[op], seconds=0.001)
    assert {row.impl for row in rows} >= {PLAIN, "reference"}
    plain = next(row for row in rows if row.impl == PLAIN)
    assert plain.ratio_to_torch == 1
    for row in rows:
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.gb_per_s > 0
        assert row.ratio_to_torch == pytest.approx(plain.median_us / row.median_us, rel=0.02)


@pytest.mark.parametrize("op", list(OPS))
def test_every_shape_has_the_inputs_of_its_op(op):
    assert OPS[op].shapes
    assert all(set(shape.sizes) == set(SMALL[op].sizes) for shape in OPS[op].shapes)


def test_bytes_are_those_of_each_tensor_once():
    shape = Shape({"B": 2, "L": 5, "C": 6}, torch.bfloat16)
    # Sample read and written in float32, three velocities read in bfloat16.
    assert OPS["guided_flow_step"].build(shape).num_bytes == 2 * 5 * 6 * (4 + 4 + 3 * 2)


def test_a_wrong_run_has_no_time():
    case = Case({PLAIN: lambda: torch.ones(3), "cpp": lambda: torch.full((3,), 1.1)}, 12, 1e-3)
    with pytest.raises(ValueError, match=r"cpp differs from plain torch by 1\.0e-01, allowed are 1\.0e-03"):
        check_case(case)
    broken = Case({PLAIN: lambda: torch.ones(3), "cpp": lambda: torch.full((3,), torch.nan)}, 12, 1e-3)
    with pytest.raises(ValueError, match="cpp differs from plain torch by nan"):
        check_case(broken)


def test_command_appends_one_json_object_a_line(tmp_path, capsys, monkeypatch):
    swiglu = OPS["swiglu"]
    monkeypatch.setitem(OPS, "swiglu", Op(swiglu.build, [SMALL["swiglu"]]))
    out = tmp_path / "rows" / "cpu.jsonl"
    for _ in range(2):
        assert (
            command.main(["--op", "swiglu", "--seconds", "0.001", "--threads", "1", "--out", str(out)]) == 0
        )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4
    assert all(set(row) == {field.name for field in fields(Row)} for row in rows)
    assert rows[0]["shape"] == "L5 E6"
    assert "rows appended to" in capsys.readouterr().out


def test_committed_rows_can_be_read():
    lines = command.RESULTS.read_text().splitlines()
    rows = [Row(**json.loads(line)) for line in lines]
    measured = {(row.op, row.shape) for row in rows if row.impl == "cpp"}
    assert {("guided_flow_step", str(shape)) for shape in OPS["guided_flow_step"].shapes} <= measured
