"""CPU timings on pytest-benchmark; `python -m bench` runs them and makes rows of what they leave.

One test is one case. Its runs take turns, a round each, so that a busy machine hits all of them: round i of
the report is a round of run i modulo their number.
"""

from __future__ import annotations

import time
from itertools import cycle

import torch

from bench.case import Run
from bench.gate import keep_right_runs
from bench.registry import OPS

ROUND_SECONDS = (
    2e-3  # of repeated calls, so that the clock's grain and the cache left by another run do not count
)
MIN_TURNS = 7


def test_case(op, shape, seconds, benchmark):
    case = OPS[op].build(shape, torch.device("cpu"))
    runs, notes = keep_right_runs(case)
    runs = {
        name: run for name, run in runs.items() if name not in ("triton", "cuda")
    }  # never at speed on a CPU
    with torch.no_grad():
        calls = {name: count_calls(run) for name, run in runs.items()}
        turns = cycle([(run, calls[name]) for name, run in runs.items()])
        begin = time.perf_counter()
        for run, count in [next(turns) for _ in runs]:
            call_often(run, count)
        num_turns = max(MIN_TURNS, int(seconds * len(runs) / (time.perf_counter() - begin)))
        benchmark.extra_info.update(
            op=op,
            shape=str(shape),
            dtype=str(shape.dtype).removeprefix("torch."),
            num_bytes=case.num_bytes,
            calls=calls,
            notes=notes,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )
        benchmark.pedantic(call_often, setup=lambda: (next(turns), {}), rounds=num_turns * len(runs))


def count_calls(run: Run) -> int:
    """How many calls make a round."""
    run()
    begin = time.perf_counter()
    run()
    return max(1, int(ROUND_SECONDS / (time.perf_counter() - begin)))


def call_often(run: Run, count: int) -> None:
    """One round."""
    for _ in range(count):
        run()
