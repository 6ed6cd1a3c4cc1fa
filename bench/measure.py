"""Measures one case on a device: the gate, then the times of all its runs and of the compiled baseline.

What the device's clock is, a `Timer` says: `bench.device` has the one for CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

from bench.case import OURS, PLAIN, Case, Run, Shape
from bench.gate import keep_right_runs
from bench.registry import OPS
from bench.rows import GpuRow, Spread, describe_times

COMPILED = "torch.compile"
MAX_SETS = 128
SET_SECONDS = 2.0  # what building more sets of inputs may take


@dataclass(frozen=True)
class Machine:
    """What rows say of a device, and the two rates it can reach, measured in this process."""

    gpu: str
    driver: str
    torch: str
    triton: str
    copy_gb_per_s: float
    matmul_tflop_per_s: float


@dataclass(frozen=True)
class Timing:
    """Times of one run; the fields are those of `GpuRow`."""

    spread: Spread
    call_us: float
    method: str
    launches: int


class Timer(Protocol):
    """The clock of a device."""

    device: torch.device
    cache_bytes: int  # of the L2 cache

    @property
    def machine(self) -> Machine:
        """What the device is and can do; measured when first asked for."""

    def scope(self) -> AbstractContextManager:
        """Everything that is measured is built and called within this."""

    def time(self, runs: Sequence[Run]) -> Timing:
        """Time one run; `runs` are the same on equal sets of inputs, which take turns."""


@dataclass(frozen=True)
class Task:
    """A case to measure, and those of its runs that are left out because they failed before."""

    op: str
    shape: Shape
    without: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {str(self.shape.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Measured:
    """What came of a task: times by the names of the runs, and lines about what was left out."""

    machine: Machine
    num_bytes: int
    num_flops: int
    input_sets: int
    timings: dict[str, Timing]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Compiled:
    """What came of a task that was only to be compiled."""

    notes: list[str]


def measure_case(task: Task, timer: Timer, announce: Callable[[str], None]) -> Measured:
    """Gate and time the runs of a case; `announce` is told what is called next, in case it never returns.

    Raises: ValueError if a run of ours gives wrong numbers.
    """
    case, notes = build_case(task, timer, announce)
    watched = {name: _announced(name, run, announce) for name, run in case.runs.items()}
    right, faults = keep_right_runs(replace(case, runs=watched))
    sets = build_sets(task, timer, case)
    timings = {}
    for name in right:
        announce(name)
        with torch.no_grad():
            timings[name] = timer.time([one.runs[name] for one in sets])
    numbers = (case.num_bytes, case.num_flops, len(sets))
    return Measured(timer.machine, *numbers, timings, notes + faults)


def compile_case(task: Task, timer: Timer, announce: Callable[[str], None]) -> Compiled:
    """Only compile the baseline: the compiler's cache then has it when `measure_case` asks."""
    _, notes = build_case(task, timer, announce)
    return Compiled(notes)


def build_case(task: Task, timer: Timer, announce: Callable[[str], None]) -> tuple[Case, list[str]]:
    """The case of a task with its compiled baseline, called once; or a line on why there is none."""
    announce("build")
    prepare_compiler()
    case = OPS[task.op].build(task.shape, timer.device)
    case = replace(case, runs={name: run for name, run in case.runs.items() if name not in task.without})
    if COMPILED in task.without:
        return case, []
    announce(COMPILED)
    try:
        compiled = add_compiled(case)
        with torch.no_grad():
            compiled.runs[COMPILED]()
    except torch._dynamo.exc.TorchDynamoException as error:
        return case, [f"{COMPILED} left out: {str(error).strip().splitlines()[0]}"]
    return compiled, []


def prepare_compiler() -> None:
    """Forget what was compiled for other cases, and let no choice be read that was made beside the tests."""
    from torch._inductor import config  # takes seconds, and only this process needs it

    torch.compiler.reset()
    config.autotune_local_cache = False


def add_compiled(case: Case) -> Case:
    """The case with one more run: its plain run, or its form for this purpose, through torch.compile."""
    compiler = partial(torch.compile, fullgraph=True, dynamic=False)
    run = case.compiled(compiler) if case.compiled else compiler(case.runs[PLAIN])
    return replace(case, runs=case.runs | {COMPILED: run})


def build_sets(task: Task, timer: Timer, first: Case) -> list[Case]:
    """As many equal cases, `first` among them, as hold twice the cache; fewer where building is slow."""
    wanted = min(MAX_SETS, -(-2 * timer.cache_bytes // max(first.num_bytes, 1)))
    sets, begin = [first], time.perf_counter()
    while len(sets) < wanted and time.perf_counter() - begin < SET_SECONDS:
        case = OPS[task.op].build(task.shape, timer.device)
        sets.append(add_compiled(case) if COMPILED in first.runs else case)
    return sets


def make_rows(task: Task, measured: Measured, commit: str) -> list[GpuRow]:
    """A row for every run."""
    machine, timings = measured.machine, measured.timings
    fields = describe_times({name: timing.spread for name, timing in timings.items()}, measured.num_bytes)
    return [
        GpuRow(
            op=task.op,
            impl=name,
            shape=str(task.shape),
            dtype=str(task.shape.dtype).removeprefix("torch."),
            commit=commit,
            copy_share=round(fields[name]["gb_per_s"] / machine.copy_gb_per_s, 4),
            tflop_per_s=float(f"{measured.num_flops / timing.spread.median_us / 1e6:.4g}"),
            call_us=round(timing.call_us, 2),
            method=timing.method,
            launches=timing.launches,
            input_sets=measured.input_sets,
            **fields[name] | {"times_faster": compare(timing, timings)},
            **vars(machine),
        )
        for name, timing in timings.items()
    ]


def compare(timing: Timing, timings: dict[str, Timing]) -> dict[str, float]:
    """Times faster than each baseline; where only one of the two was captured, by their calls from Python."""

    def divide(other: Timing) -> float:
        if other.method == timing.method:
            return other.spread.median_us / timing.spread.median_us
        return other.call_us / timing.call_us

    return {name: float(f"{divide(other):.3g}") for name, other in timings.items() if name not in OURS}


def _announced(name: str, run: Run, announce: Callable[[str], None]) -> Run:
    def call():
        announce(name)
        return run()

    return call
