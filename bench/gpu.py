"""`python -m bench.gpu`: run the kernels' tests on the GPU, then time every op that is green, in minutes.

Rows are appended as they come, the most telling shapes first: what is measured when the time is up, or when
the command is killed, is kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from bench.__main__ import print_table
from bench.device import CudaTimer
from bench.green import Verdict, is_green, list_test_commands, run_tests
from bench.measure import Measured, Task, compile_case, make_rows, measure_case
from bench.registry import OPS
from bench.rows import RESULTS, GpuRow, append_rows, name_commit
from bench.supervise import Worker, work_off

FAST = ("triton", "cuda")  # what the printed table is about; the rows have everything
COLUMNS = (
    "op",
    "impl",
    "shape",
    "dtype",
    "median_us",
    "copy_share",
    "tflop_per_s",
    "launches",
    "times_faster",
)
TESTS_SHARE = 0.5  # of the time, at most, for the tests and the compilations beside them
NUM_COMPILERS = 4
NUM_TESTS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 if anything was red, wrong or died, 2 without a GPU."""
    options = build_parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device here (python -m bench times the CPU)", file=sys.stderr)
        return 2
    begin = time.monotonic()
    tasks = plan_tasks(options.op or list(OPS))
    verdicts = check_and_compile(tasks, begin + 60 * options.minutes * TESTS_SHARE)
    report_verdicts(verdicts, options.out.with_suffix(".tests.log"))
    green = [task for task in tasks if is_green(task.op, verdicts)]
    rows, problems = measure_all(green, options, begin + 60 * options.minutes)
    print_table([row for row in rows if row.impl in FAST], COLUMNS)
    print(*problems, sep="\n")
    print(f"{len(rows)} rows appended to {options.out} in {time.monotonic() - begin:.0f} s")
    return int(bool(problems) or not all(verdict.is_green for verdict in verdicts.values()))


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m bench.gpu`."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--op", action="append", choices=list(OPS), help="this op only; may be repeated")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything (8.5)")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.jsonl", help="where rows are appended")
    parser.add_argument("--commit", default=name_commit(), help="what rows say of it, in a copy without git")
    return parser


def plan_tasks(ops: Sequence[str]) -> list[Task]:
    """Every op's first shape, then every op's second, and so on."""
    ranked = [(rank, Task(op, shape)) for op in ops for rank, shape in enumerate(OPS[op].gpu_shapes)]
    return [task for _, task in sorted(ranked, key=lambda pair: pair[0])]


def check_and_compile(tasks: Sequence[Task], deadline: float) -> dict[str, Verdict]:
    """Run the tests, and beside them compile the baselines, which takes longer than to measure them."""
    commands = list_test_commands(list(dict.fromkeys(task.op for task in tasks)))
    at_once = max(1, min(NUM_TESTS, (os.cpu_count() or 1) - NUM_COMPILERS))
    with ThreadPoolExecutor(NUM_COMPILERS) as pool:
        for part in range(NUM_COMPILERS):
            start = partial(Worker, CudaTimer, compile_case)
            pool.submit(work_off, tasks[part::NUM_COMPILERS], start, deadline, lambda *_: None)
        return run_tests(commands, deadline, at_once)


def report_verdicts(verdicts: dict[str, Verdict], log: Path) -> None:
    """A line for each test file; the output of the red ones goes to a file, and its end is printed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    red = {name: verdict for name, verdict in verdicts.items() if not verdict.is_green}
    log.write_text("".join(f"== {name}\n{verdict.output}" for name, verdict in red.items()))
    for name, verdict in verdicts.items():
        print(f"{'green' if verdict.is_green else 'RED  '} {verdict.seconds:5.0f} s  {name}")
        if not verdict.is_green:
            print("  " + "\n  ".join(verdict.output.splitlines()[-12:]))


def measure_all(
    tasks: list[Task], options: argparse.Namespace, deadline: float
) -> tuple[list[GpuRow], list[str]]:
    """Measure until the deadline. Returns the rows, and a line for everything that was wrong."""
    rows: list[GpuRow] = []

    def report(task: Task, measured: Measured) -> None:
        new = make_rows(task, measured, options.commit)
        append_rows(new, options.out)
        rows.extend(new)
        lines = [summarize(new), *measured.notes]
        print(f"{deadline - time.monotonic():4.0f} s left  {task}: {'; '.join(lines)}", flush=True)

    problems, missed = work_off(tasks, partial(Worker, CudaTimer, measure_case), deadline, report)
    print(*(f"{task}: not measured, no time was left" for task in missed), sep="\n")
    return rows, problems


def summarize(rows: Sequence[GpuRow]) -> str:
    """Our runs in a line."""
    return "; ".join(
        f"{row.impl} {row.median_us:.4g} us, {row.copy_share:.0%} of a copy, {row.launches} launches"
        for row in rows
        if row.impl in FAST
    )


if __name__ == "__main__":
    sys.exit(main())
