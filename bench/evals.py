"""`python -m bench.evals`: what `realign eval` finds of mini and its CLIP, as rows."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.generate.report import name_machine, name_whole_commit
from bench.rows import RESULTS, append_rows
from realign.cli.__main__ import main as run_command

BENCHMARKS = ("world", "clip")


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """The JSON object that `realign eval BENCHMARK` prints."""

    benchmark: str
    result: dict[str, Any]
    machine: str
    torch: str
    commit: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: the first of `realign eval` that is not 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.evals", description=__doc__)
    parser.add_argument("--benchmark", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--num", help="scenes, instead of each benchmark's own number")
    parser.add_argument("--out", type=Path, default=RESULTS / "evals.jsonl", help="where rows are appended")
    options = parser.parse_args(arguments)
    for name in options.benchmark:
        printed, size = io.StringIO(), ["--num", options.num] if options.num else []
        with contextlib.redirect_stdout(printed):
            code = run_command(["eval", name, "--device", "cpu", *size])
        if code:
            return code
        append_rows([make_row(name, printed.getvalue())], options.out)
    print(f"{len(options.benchmark)} rows appended to {options.out}")
    return 0


def make_row(name: str, printed: str) -> EvalRow:
    """Of what a benchmark printed: its last line is the object."""
    return EvalRow(
        benchmark=name,
        result=json.loads(printed.splitlines()[-1]),
        machine=name_machine(torch.device("cpu")),
        torch=torch.__version__,
        commit=name_whole_commit(),
    )


if __name__ == "__main__":
    sys.exit(main())
