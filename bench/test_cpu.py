"""CPU timings on pytest-benchmark; `python -m bench` runs them and makes rows of what they leave.

One test is one case. Its runs take turns, a round each, so that a busy machine hits all of them: round i of
the report is a round of run i modulo their number.
"""

from __future__ import annotations

import time
from itertools import cycle
from statistics import fmean

import torch

from bench.case import Run
from bench.gate import keep_right_runs
from bench.registry import OPS

# A round is long enough for the clock, and so short that on a busy machine most rounds pass between two
# interruptions: the median is then one of those.
ROUND_SECONDS = 3e-4
MIN_TURNS = 7
NEVER_ON_CPU = ("triton", "cuda")  # Triton's interpreter says nothing of speed


def test_case(op, shape, seconds, benchmark):
    case = OPS[op].build(shape, torch.device("cpu"))
    runs, notes = keep_right_runs(case)
    with torch.no_grad():
        times = {name: time_calls(run) for name, run in runs.items() if name not in NEVER_ON_CPU}
        calls = {name: max(1, int(ROUND_SECONDS / min(some))) for name, some in times.items()}
        one_turn = sum(calls[name] * fmean(some) for name, some in times.items())
        turns = cycle([(runs[name], count) for name, count in calls.items()])
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
        num_turns = max(MIN_TURNS, int(seconds * len(calls) / one_turn))
        benchmark.pedantic(call_often, setup=lambda: (next(turns), {}), rounds=num_turns * len(calls))


def time_calls(run: Run) -> list[float]:
    """Seconds of a few calls, after one to warm up."""
    run()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return times


def call_often(run: Run, count: int) -> None:
    """One round."""
    for _ in range(count):
        run()
