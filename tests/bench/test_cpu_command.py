"""`python -m bench` times on pytest-benchmark and leaves rows."""

from __future__ import annotations

from collections import Counter

import pytest

from bench import __main__ as command
from bench.registry import OPS
from bench.rows import read_rows


def test_command_prints_a_table_and_appends_rows(tmp_path, capfd):
    out = tmp_path / "cpu.jsonl"
    options = ["--op", "swiglu", "--quick", "--seconds", "0.001", "--threads", "1", "--out", str(out)]
    assert command.main(options) == 0
    rows = read_rows(out)
    assert {row.impl for row in rows} >= {"torch", "reference"}
    assert not {"triton", "cuda"} & {row.impl for row in rows}  # on a CPU they have no speed worth a row
    shape = OPS["swiglu"].shapes[0]
    for row in rows:
        assert (row.op, row.shape, row.dtype, row.threads) == ("swiglu", str(shape), "float32", 1)
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.gb_per_s > 0
    plain = next(row for row in rows if row.impl == "torch")
    for row in rows:
        assert row.times_faster["torch"] == pytest.approx(plain.median_us / row.median_us, rel=0.02)
    printed = capfd.readouterr().out
    assert f"{len(rows)} rows appended to {out}" in printed
    assert "times_faster" in printed


def test_an_unknown_op_is_refused(tmp_path):
    out = tmp_path / "cpu.jsonl"
    assert command.main(["--op", "no_such_op", "--out", str(out)]) != 0
    assert read_rows(out) == []


def test_a_report_becomes_rows_by_turns():
    info = {"op": "swiglu", "shape": "L5 E6", "dtype": "float32", "threads": 1, "torch": "2.13.0"}
    info |= {"num_bytes": 1000, "calls": {"torch": 10, "cpp": 100}, "notes": []}
    times = [4e-5, 1e-4, 4e-5, 1e-4, 4e-5, 1e-4]  # a round of plain torch, a round of ours
    rows = command.make_rows({"benchmarks": [{"extra_info": info, "stats": {"data": times}}]})
    assert [(row.impl, row.median_us) for row in rows] == [("torch", 4.0), ("cpp", 1.0)]
    assert rows[1].times_faster == {"torch": 4.0}
    assert Counter(row.gb_per_s for row in rows) == {0.25: 1, 1.0: 1}
