"""`python -m bench`: time every op against plain torch, print a table, append rows to results/cpu.jsonl."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.measure import Row, measure_op
from bench.registry import OPS

RESULTS = Path(__file__).parent / "results" / "cpu.jsonl"
COLUMNS = ("op", "impl", "shape", "dtype", "median_us", "p20_us", "p80_us", "gb_per_s", "ratio_to_torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for op in options.op or OPS:
        shapes = OPS[op].shapes[:1] if options.quick else OPS[op].shapes
        for shape in shapes:
            rows += measure_op(op, shape, options.seconds)
    print_table(rows)
    write_rows(rows, options.out)
    print(f"{len(rows)} rows appended to {options.out}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m bench`."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--op", action="append", choices=list(OPS), help="this op only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="the first shape of each op only")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement (0.3)")
    parser.add_argument("--threads", type=int, help="torch threads (torch's own default)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help=f"file the rows are appended to ({RESULTS.name})"
    )
    return parser


def print_table(rows: Sequence[Row]) -> None:
    """The rows for people."""
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(str(getattr(row, column)) for column in COLUMNS))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Append one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
