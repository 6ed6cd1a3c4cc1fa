"""`python -m bench`: time every op on the CPU against its baselines, print a table, append rows."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.rows import RESULTS, CpuRow, Row, Spread, append_rows, describe_times, name_commit, name_cpu

ROOT = Path(__file__).parents[1]
COLUMNS = ("op", "impl", "shape", "dtype", "median_us", "p20_us", "p80_us", "gb_per_s", "times_faster")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 if a case has no rows because its numbers are wrong."""
    options = build_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code = run_pytest(options, report)
        rows = make_rows(json.loads(report.read_text())) if report.exists() else []
    print_table(rows, COLUMNS)
    append_rows(rows, options.out)
    print(f"{len(rows)} rows appended to {options.out}")
    return code


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m bench`."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--op", action="append", default=[], help="this op only; may be repeated")
    parser.add_argument("--quick", action="store_true", help="the first shape of each op only")
    parser.add_argument("--seconds", type=float, default=0.15, help="time for each measurement (0.15)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (torch's own default)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.jsonl", help="where rows are appended")
    return parser


def run_pytest(options: argparse.Namespace, report: Path) -> int:
    """Run the timings in a process of their own; they leave a report. Returns pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "bench/test_cpu.py", f"--benchmark-json={report}"]
    command += ["--benchmark-quiet", "--tb=short", f"--bench-seconds={options.seconds}"]
    command += [f"--bench-op={op}" for op in options.op]
    command += ["--bench-quick"] if options.quick else []
    command += [f"--bench-threads={options.threads}"] if options.threads else []
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def make_rows(report: dict) -> list[CpuRow]:
    """The rows of a report of pytest-benchmark."""
    machine = {"cpu": name_cpu(), "commit": name_commit()}
    rows = []
    for test in report["benchmarks"]:
        info, times = test["extra_info"], test["stats"]["data"]
        where = {name: info[name] for name in ("op", "shape", "dtype", "threads", "torch")}
        calls = info["calls"]  # by the names of the runs, in the order of their turns
        spreads = {
            name: Spread.of([1e6 * seconds / count for seconds in times[turn :: len(calls)]])
            for turn, (name, count) in enumerate(calls.items())
        }
        fields = describe_times(spreads, info["num_bytes"])
        rows += [CpuRow(impl=name, **fields[name], **where, **machine) for name in calls]
        for note in info["notes"]:
            print(f"{info['op']} {info['shape']}: {note}")
    return rows


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """The rows for people."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(format_field(getattr(row, column)) for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def format_field(value: object) -> str:
    """A cell of the table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:g}" for name, number in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
