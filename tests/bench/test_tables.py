"""The README's tables are what the rows say."""

from __future__ import annotations

import json
import shutil

import pytest

from bench.rows import RESULTS
from bench.tables import limits
from bench.tables.__main__ import BLOCK, README, TABLES, fill, main
from bench.tables.format import format_rate


def test_the_readme_has_the_rows_that_are_committed():
    page = README.read_text(encoding="utf-8")
    assert {found[2] for found in BLOCK.finditer(page)} == set(TABLES)
    assert fill(page) == page, "run: python -m bench.tables"


def test_a_measured_row_takes_its_place(tmp_path, monkeypatch):
    """A row of W1 and one of CLIP scoring, as if an H200 had been measured; others' machines do not count."""
    shutil.copytree(RESULTS, tmp_path / "results")
    monkeypatch.setattr(limits, "RESULTS", tmp_path / "results")
    assert limits.build_limits().count("not yet") == len(limits.LIMITS)
    add_row("generate.jsonl", tmp_path, workload="W1", variant="batch 1", seconds=7.9, images=1)
    add_row("align.jsonl", tmp_path, workload="clip", variant="1024x1024", samples_per_s=2512.0)
    add_row("generate.jsonl", tmp_path, "NVIDIA A100", workload="W3", variant="unguided")
    lines = limits.build_limits().splitlines()
    assert "| 8.0 | 7.9 |" in lines[2]
    assert "| 2,000 | 2,500 |" in lines[-1]
    assert sum("not yet" in line for line in lines) == len(limits.LIMITS) - 2


def add_row(name: str, folder, machine: str = "NVIDIA H200", **fields) -> None:
    """The file's first row of ours, with other fields."""
    path = folder / "results" / name
    lines = path.read_text().splitlines()
    ours = next(row for row in map(json.loads, lines) if row["impl"] == "engine")
    path.write_text("\n".join([*lines, json.dumps(ours | {"machine": machine} | fields)]) + "\n")


def test_a_page_is_written_between_its_marks_alone(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- rows: quality -->\nold\n<!-- end of rows -->\nafter\n")
    assert main(["--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- rows: quality -->\n|  | branch runs of 90 |")
    assert text.endswith("|\n<!-- end of rows -->\nafter\n")
    assert "old" not in text
    assert main(["--readme", str(page)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{page}: written", f"{page}: as it was"]


def test_a_table_that_is_not_there_is_refused(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(text := "<!-- rows: opinions -->\n<!-- end of rows -->\n")
    assert main(["--readme", str(page)]) == 2
    assert "'opinions': not one of generation, " in capsys.readouterr().err
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("rate", "said"), [(0.5861, "0.586"), (73.01, "73"), (9959.0, "10,000"), (38.04, "38")]
)
def test_rates_have_three_digits(rate, said):
    assert format_rate(rate) == said
