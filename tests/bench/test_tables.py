"""The README's tables are what the rows say."""

from __future__ import annotations

import json
import shutil

import pytest

from bench.rows import RESULTS
from bench.tables import format, limits
from bench.tables import results as table_results
from bench.tables.__main__ import BLOCK, README, TABLES, fill, main
from bench.tables.format import format_rate


def test_the_readme_has_the_rows_that_are_committed():
    page = README.read_text(encoding="utf-8")
    assert {found[2] for found in BLOCK.finditer(page)} == set(TABLES)
    assert fill(page) == page, "run: python -m bench.tables"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results without a GPU's, in place of the committed one."""
    shutil.copytree(RESULTS, folder := tmp_path / "results")
    for path in (folder / "generate.jsonl", folder / "align.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "NVIDIA" not in line))
    for module in (limits, format, table_results):
        monkeypatch.setattr(module, "RESULTS", folder)
    return folder


def test_a_measured_row_takes_its_place(results):
    """A row of W1 and one of CLIP scoring, as if an H200 had been measured."""
    assert limits.build_limits().count("not yet") == len(limits.LIMITS)
    h200 = {"machine": "NVIDIA H200", "dtype": "bfloat16", "model": "bagel-7b"}
    w1 = h200 | {"workload": "W1", "variant": "batch 1", "seconds": 7.9, "images": 1, "measured_images": 1}
    add_row(results / "generate.jsonl", w1)
    clip = {"workload": "clip", "variant": "1024x1024", "samples_per_s": 2512.0, "samples": 512}
    add_row(results / "align.jsonl", h200 | clip | {"model": "ViT-L-14"})
    lines = limits.build_limits().splitlines()
    assert "| 8.0 | 7.9 |" in lines[2]
    assert "| 2,000 | 2,500 |" in lines[-1]
    assert sum("not yet" in line for line in lines) == len(limits.LIMITS) - 2


@pytest.mark.parametrize(
    "other", [{"machine": "NVIDIA A100"}, {"model": "mini"}, {"dtype": "float32"}, {"measured_images": 1}]
)
def test_another_models_or_machines_row_or_a_part_is_none(results, other):
    row = {"machine": "NVIDIA H200", "dtype": "bfloat16", "model": "bagel-7b", "measured_images": 24}
    add_row(results / "generate.jsonl", row | {"workload": "W3", "variant": "unguided"} | other)
    assert limits.build_limits().count("not yet") == len(limits.LIMITS)


@pytest.mark.parametrize("other", [{"machine": "NVIDIA H200"}, {"threads": 1}, {"dtype": "bfloat16"}])
def test_minis_table_is_of_two_cores(results, other):
    before = table_results.build_generation()
    add_row(results / "generate.jsonl", {"images_per_s": 9999.0} | other)
    assert table_results.build_generation() == before
    add_row(results / "generate.jsonl", {"images_per_s": 9999.0})
    assert "10,000 images/s" in table_results.build_generation()


def add_row(path, fields: dict) -> None:
    """The file's first row of ours, with other fields."""
    lines = path.read_text().splitlines()
    ours = next(row for row in map(json.loads, lines) if row["impl"] == "engine")
    path.write_text("\n".join([*lines, json.dumps(ours | fields)]) + "\n")


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- rows: opinions -->\n<!-- end of rows -->\n", "'opinions': not one of generation, "),
        (
            "<!-- rows: quality -->\nprose\n<!-- rows: limits -->\n<!-- end of rows -->\n",
            "a table without <!-- end of rows -->",
        ),
    ],
)
def test_a_page_that_cannot_be_filled_is_refused_and_kept(tmp_path, capsys, text, said):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert main(["--readme", str(page)]) == 2
    assert said in capsys.readouterr().err
    assert page.read_text() == text


def test_rows_that_are_not_there_are_named(results, tmp_path, capsys):
    (results / "quality.jsonl").unlink()
    page = tmp_path / "page.md"
    page.write_text("<!-- rows: quality -->\n<!-- end of rows -->\n")
    assert main(["--readme", str(page)]) == 2
    assert "quality.jsonl is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("share", "sign", "said"),
    [(0.9941, "", ".994"), (1.0, "", "1.000"), (-0.012, "+", "-.012"), (None, "", "")],
)
def test_shares_have_no_leading_zero(share, sign, said):
    assert format.cut_zero(share, sign) == said


@pytest.mark.parametrize(
    ("rate", "said"), [(0.5861, "0.586"), (73.01, "73"), (9959.0, "10,000"), (999.6, "1,000")]
)
def test_rates_have_three_digits(rate, said):
    assert format_rate(rate) == said
