"""Rows say everything, and can be read again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench import rows
from bench.rows import CpuRow, Spread, append_rows, describe_times, keep_latest, read_rows

ROW = CpuRow(
    op="swiglu",
    impl="cpp",
    shape="L5 E6",
    dtype="float32",
    median_us=2.0,
    p20_us=1.5,
    p80_us=3.0,
    gb_per_s=1.2,
    times_faster={"torch": 3.0},
    torch="2.13.0",
    commit="abc",
    cpu="a chip",
    threads=2,
)


def test_spread_of_times():
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0)
    assert Spread.of([float(i) for i in range(11)]) == Spread(2.0, 5.0, 8.0)


def test_rates_and_ratios_follow_from_the_times():
    spreads = {"torch": Spread(9, 10, 12), "diffusers": Spread(19, 20, 21), "cpp": Spread(4, 5, 6)}
    fields = describe_times(spreads, num_bytes=100_000)
    assert fields["cpp"]["times_faster"] == {"torch": 2.0, "diffusers": 4.0}
    assert fields["torch"]["times_faster"] == {"torch": 1.0, "diffusers": 2.0}
    assert fields["cpp"]["gb_per_s"] == pytest.approx(100_000 / 5e-6 / 1e9)
    assert (fields["cpp"]["p20_us"], fields["cpp"]["median_us"], fields["cpp"]["p80_us"]) == (4, 5, 6)


def test_rows_are_appended_a_line_each_and_read_again(tmp_path):
    path = tmp_path / "new" / "cpu.jsonl"
    append_rows([ROW], path)
    append_rows([replace(ROW, impl="torch")], path)
    assert [json.loads(line)["impl"] for line in path.read_text().splitlines()] == ["cpp", "torch"]
    assert read_rows(path) == [ROW, replace(ROW, impl="torch")]


def test_the_last_measurement_counts():
    newer, one_thread = replace(ROW, median_us=1.0), replace(ROW, threads=1)
    assert keep_latest([ROW, one_thread, newer]) == [newer, one_thread]


def test_a_commit_is_named_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert rows.name_commit() == "unknown"


def test_committed_rows_can_be_read():
    files = [path for path in rows.RESULTS.glob("*pu.jsonl") if path.exists()]
    assert files
    for path in files:
        for row in read_rows(path):
            assert 0 < row.p20_us <= row.median_us <= row.p80_us
            assert row.times_faster["torch"] > 0
            assert "dirty" not in row.commit
