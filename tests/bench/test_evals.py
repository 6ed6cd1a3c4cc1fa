"""`bench.evals`: what `realign eval` prints becomes a row."""

from __future__ import annotations

import json

from bench import evals
from bench.evals import main
from realign.evals.ranking import SORTS


def test_a_row_has_what_the_benchmark_found(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert main(["--benchmark", "clip", "--num", "6", "--out", str(path)]) == 0
    (row,) = map(json.loads, path.read_text().splitlines())
    assert row["benchmark"] == "clip"
    assert set(row["result"]) == set(SORTS)
    assert row["result"]["rendered"]["place"]["n"] == 6
    assert row["commit"]


def test_a_benchmark_that_fails_leaves_no_row(tmp_path, monkeypatch):
    monkeypatch.setattr(evals, "run_command", lambda arguments: 2)
    assert main(["--out", str(tmp_path / "rows.jsonl")]) == 2
    assert not (tmp_path / "rows.jsonl").exists()
