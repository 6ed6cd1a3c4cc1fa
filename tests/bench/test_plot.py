"""Pictures are drawn from rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import plot
from bench.rows import GpuRow, append_rows
from tests.bench.test_rows import ROW

GPU_ROW = GpuRow(
    **{name: value for name, value in vars(ROW).items() if name not in ("cpu", "threads", "impl")},
    impl="triton",
    copy_share=0.9,
    tflop_per_s=0.0,
    call_us=9.0,
    method="graph",
    launches=1,
    input_sets=4,
    copy_gb_per_s=4300.0,
    matmul_tflop_per_s=790.0,
    gpu="a GPU",
    driver="580",
    triton="3.6.0",
)


def grow(row):
    """The row and larger ones."""
    return [
        replace(row, shape=f"L{5 * times} E6", median_us=times * row.median_us, times_faster={"torch": times})
        for times in (1, 4, 16)
    ]


@pytest.fixture
def rows():
    """Two ops; one has another path of ours."""
    plain, library = replace(ROW, impl="torch"), replace(ROW, impl="diffusers", dtype="bfloat16")
    slow = replace(ROW, op="rms_norm", impl="reference")
    further = replace(ROW, op="swiglu.backward")
    kinds = (ROW, plain, library, slow, replace(slow, impl="torch"), further)
    return [row for one in kinds for row in grow(one)]


def test_a_panel_has_a_line_for_each_run_and_dtype(rows):
    figure = plot.draw_panels(rows, plot.SPEED)
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title(loc="left") for panel in panels] == ["swiglu"]
    lines = [line.get_xydata().tolist() for line in panels[0].lines if line.get_linestyle() != "None"]
    assert len(lines) == 3  # the first is the one across
    for points in lines[1:]:
        assert points == [pytest.approx(point) for point in ([0.0024, 1], [0.0096, 4], [0.038, 16])]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "cpp",
        "diffusers",
        "float32",
        "bfloat16",
    ]
    assert "a chip, 2 threads, torch 2.13.0, abc" in figure.get_suptitle()


def test_of_several_numbers_of_threads_the_most_are_drawn(rows):
    single = [replace(row, threads=1) for row in rows]
    assert plot.select_rows(single + rows, plot.SPEED) == plot.select_rows(rows, plot.SPEED)


def test_plain_torch_is_drawn_where_it_is_not_one_by_definition():
    rows = [row for impl in ("triton", "torch") for row in grow(replace(GPU_ROW, impl=impl))]
    assert {row.impl for row in plot.select_rows(rows, plot.COPY_SHARE)} == {"triton", "torch"}
    assert {row.impl for row in plot.select_rows(rows, plot.SPEED)} == {"triton"}


def test_command_draws_what_there_is(rows, tmp_path):
    append_rows(rows, tmp_path / "rows" / "cpu.jsonl")
    options = ["--results", str(tmp_path / "rows"), "--out", str(tmp_path / "docs")]
    assert plot.main(options) == 0
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["kernels-cpu.png"]
    append_rows(grow(GPU_ROW), tmp_path / "rows" / "gpu.jsonl")
    assert plot.main(options) == 0
    pictures = sorted((tmp_path / "docs").iterdir())
    assert [path.name for path in pictures] == ["kernels-cpu.png", "kernels-gpu-copy.png", "kernels-gpu.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
