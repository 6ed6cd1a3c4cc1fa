"""`python -m bench.plot`: draw the rows, a panel for each op: how fast our paths and libraries are, by size.

From CPU rows speed against plain torch; from GPU rows that, and the share of the copy bandwidth.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.case import PLAIN
from bench.rows import RESULTS, Row, keep_latest, read_rows

DOCS = Path(__file__).parents[1] / "docs"
NUM_COLUMNS = 4
COLORS = {  # of Okabe and Ito: also apart for colour-blind eyes
    "cpp": "#0072B2",
    "triton": "#0072B2",
    "cuda": "#009E73",
    PLAIN: "#000000",
    "torch.compile": "#E69F00",
}
OTHERS = ("#CC79A7", "#D55E00", "#56B4E9", "#882255", "#999999")  # libraries, in the order of their names
LINES = {"float32": "-", "bfloat16": "--", "float16": ":"}


@dataclass(frozen=True)
class Quantity:
    """What is drawn upwards.

    Attributes:
        of: the number of a row.
        line: a value of interest, drawn across.
        is_ratio: it has no upper end and is drawn in logarithms, else from 0 to 1.
    """

    label: str
    of: Callable[[Row], float]
    line: float
    is_ratio: bool


SPEED = Quantity("times as fast as plain torch", lambda row: row.times_faster[PLAIN], 1.0, is_ratio=True)
COPY_SHARE = Quantity("share of copy bandwidth (line: 85%)", lambda row: row.copy_share, 0.85, is_ratio=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of cpu.jsonl and gpu.jsonl")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder the pictures go to")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if (path := options.results / "cpu.jsonl").exists():
        save(draw_panels(read_rows(path), SPEED), options.out / "kernels-cpu.png")
    if (path := options.results / "gpu.jsonl").exists():
        save(draw_panels(read_rows(path), SPEED), options.out / "kernels-gpu.png")
        save(draw_panels(read_rows(path), COPY_SHARE), options.out / "kernels-gpu-copy.png")
    return 0


def draw_panels(rows: Sequence[Row], quantity: Quantity) -> Figure:
    """A panel for each op that has a path of ours beside the reference."""
    rows = select_rows(rows, quantity)
    ops = list(dict.fromkeys(row.op for row in rows))
    colors = choose_colors(rows)
    num_lines = max(1, math.ceil(len(ops) / NUM_COLUMNS))
    figure = Figure(figsize=(11, 1.1 + 2.15 * num_lines), dpi=150, layout="constrained")
    panels = figure.subplots(num_lines, NUM_COLUMNS, squeeze=False).flatten()
    for panel, op in zip(panels, ops, strict=False):
        draw_op(panel, [row for row in rows if row.op == op], quantity, colors)
        panel.set_title(op, fontsize=10, loc="left", family="monospace")
    for panel in panels[len(ops) :]:
        panel.set_visible(False)
    figure.supxlabel("megabytes that a call must move", fontsize=10)
    figure.supylabel(quantity.label, fontsize=10)
    legend = make_legend(rows, colors)
    figure.legend(handles=legend, loc="outside upper left", ncols=8, frameon=False, fontsize=9)
    figure.suptitle(describe_rows(rows), fontsize=8, color="#555555", x=0.99, ha="right")
    return figure


def select_rows(rows: Sequence[Row], quantity: Quantity) -> list[Row]:
    """The last row of each kind that is to be drawn.

    Not drawn: the reference, plain torch where it is 1 by definition, further entries of an op (the rows of
    `swiglu.backward` are for reading), and of several numbers of threads the smaller ones.
    """
    hidden = ("reference", PLAIN) if quantity is SPEED else ("reference",)
    rows = [row for row in keep_latest(rows) if row.impl not in hidden and "." not in row.op]
    threads = max((getattr(row, "threads", 0) for row in rows), default=0)
    fast = {row.op for row in rows if row.impl in ("cpp", "triton", "cuda")}
    return [row for row in rows if row.op in fast and getattr(row, "threads", 0) == threads]


def choose_colors(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each run, the same in all panels."""
    impls = {row.impl for row in rows}
    others = sorted(impls - COLORS.keys())
    return {name: color for name, color in COLORS.items() if name in impls} | dict(
        zip(others, OTHERS, strict=False)
    )


def draw_op(panel: Axes, rows: Sequence[Row], quantity: Quantity, colors: dict[str, str]) -> None:
    """Points for each run and dtype over the bytes moved; a line through their (geometric) means."""
    panel.axhline(quantity.line, color="#000000", linewidth=0.8)
    for impl, dtype in dict.fromkeys((row.impl, row.dtype) for row in rows):
        by_size: dict[float, list[float]] = {}
        for row in rows:
            if (row.impl, row.dtype) == (impl, dtype):
                by_size.setdefault(count_megabytes(row), []).append(quantity.of(row))
        means = [(size, statistics.geometric_mean(values)) for size, values in sorted(by_size.items())]
        points = [(size, value) for size, values in by_size.items() for value in values]
        panel.plot(*zip(*means, strict=True), LINES[dtype], color=colors[impl], linewidth=1.4)
        panel.plot(*zip(*points, strict=True), "o", color=colors[impl], markersize=3)
    panel.set_xscale("log")
    mark_decades(panel.xaxis)
    if quantity.is_ratio:
        panel.set_yscale("log")
        mark_decades(panel.yaxis)
    else:
        panel.set_ylim(0, 1.05)
    panel.tick_params(labelsize=8)
    panel.grid(color="#DDDDDD", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def mark_decades(axis: Axis) -> None:
    """Numbers at 1, 10, 100; between them too where there would be few."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def count_megabytes(row: Row) -> float:
    """What one call must move at least, to two digits: equal sizes in other shapes then share a place."""
    return float(f"{row.gb_per_s * row.median_us / 1e3:.2g}")


def make_legend(rows: Sequence[Row], colors: dict[str, str]) -> list[Line2D]:
    """What colours and lines say."""
    runs = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    dtypes = [name for name in LINES if name in {row.dtype for row in rows}]
    return runs + [Line2D([], [], color="#777777", linestyle=LINES[name], label=name) for name in dtypes]


def describe_rows(rows: Sequence[Row]) -> str:
    """Where the rows were taken."""
    chips = {getattr(row, "gpu", None) or f"{row.cpu}, {row.threads} threads" for row in rows}
    versions, commits = {row.torch for row in rows}, {row.commit for row in rows}
    return f"{', '.join(sorted(chips))}, torch {', '.join(sorted(versions))}, {', '.join(sorted(commits))}"


def save(figure: Figure, path: Path) -> None:
    """Write a PNG that is the same for the same rows."""
    with matplotlib.rc_context({"savefig.facecolor": "white"}):
        figure.savefig(path, metadata={"Software": None})
    print(path)


if __name__ == "__main__":
    sys.exit(main())
