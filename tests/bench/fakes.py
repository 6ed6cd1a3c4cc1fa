"""A clock for machines without a GPU, and what a worker may be asked to do: its process imports this."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from bench.case import PLAIN, Case, Run
from bench.measure import Compiled, Machine, Measured, Task, Timing
from bench.rows import Spread

NUM_TIMES = 3


class WallTimer:
    """The host's clock in place of a device's."""

    device = torch.device("cpu")
    cache_bytes = 2000
    machine = Machine("a chip", "580.1", torch.__version__, "3.7.1", 4000.0, 800.0)

    def scope(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def time(self, runs: Sequence[Run]) -> Timing:
        times_us = []
        for run in (*runs, *runs, *runs):
            begin = time.perf_counter()
            run()
            times_us.append(1e6 * (time.perf_counter() - begin))
        return Timing(Spread.of(times_us), statistics.median(times_us), "graph", 1)


class BrokenTimer(WallTimer):
    """A device that is not there after all."""

    def __init__(self) -> None:
        raise RuntimeError("no device")


def measure_in_no_time(task: Task, timer: WallTimer, announce: Callable[[str], None]) -> Measured:
    """Every run of a task takes a microsecond, save some: their name says what happens."""
    announce("build")
    timings = {}
    for name in (PLAIN, "triton", task.op):
        if name in task.without:
            continue
        announce(name)
        if name == "dies":
            os._exit(3)
        if name == "hangs":
            time.sleep(600)
        if name == "wrong":
            raise ValueError("triton differs from plain torch by nan, allowed are 1.0e-05")
        timings[name] = Timing(Spread(1.0, 1.0, 1.0), 1.0, "graph", 1)
    return Measured(timer.machine, 1000, 0, 1, timings)


def compile_nothing(task: Task, timer: WallTimer, announce: Callable[[str], None]) -> Compiled:
    """There is no compiler."""
    announce("build")
    return Compiled([])


def make_case(**results: torch.Tensor) -> Case:
    """A case whose runs return what is given, by name."""
    return Case({name: lambda result=result: result for name, result in results.items()}, 12, 1e-3)
