"""Times the runs of a case, behind a gate: a run whose numbers are wrong has no time."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from bench.registry import OPS, PLAIN, Case, Shape

NUM_TURNS = 5


@dataclass(frozen=True)
class Row:
    """One measurement, as it stands in `results/*.jsonl`. Times are microseconds for one call."""

    op: str
    impl: str
    shape: str
    dtype: str
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float
    ratio_to_torch: float  # time of plain torch over this time, in the same run: above 1 is faster
    threads: int
    torch: str
    cpu: str
    commit: str


def check_case(case: Case) -> None:
    """Raise ValueError if a run differs from the plain one by more than the case allows."""
    expected = case.runs[PLAIN]().double()
    for name, run in case.runs.items():
        error = ((run().double() - expected).norm() / expected.norm()).item()
        if not error <= case.relative_error:
            raise ValueError(
                f"{name} differs from plain torch by {error:.1e}, allowed are {case.relative_error:.1e}"
            )


def measure_op(op: str, shape: Shape, seconds: float) -> list[Row]:
    """One row per implementation; `seconds` is the time spent on each."""
    case = OPS[op].build(shape)
    check_case(case)
    times = _time_runs(case.runs, seconds)
    machine = describe_machine()
    return [
        Row(
            op=op,
            impl=name,
            shape=str(shape),
            dtype=str(shape.dtype).removeprefix("torch."),
            median_us=round(median, 2),
            p20_us=round(p20, 2),
            p80_us=round(p80, 2),
            gb_per_s=float(f"{case.num_bytes / median / 1e3:.4g}"),
            ratio_to_torch=round(times[PLAIN][1] / median, 3),
            **machine,
        )
        for name, (p20, median, p80) in times.items()
    ]


def _time_runs(runs: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, list[float]]:
    """20th, 50th, 80th percentile of each run in microseconds; they take turns: a busy machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(NUM_TURNS):
            for name, run in runs.items():
                timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
                times[name] += timer.blocked_autorange(min_run_time=seconds / NUM_TURNS).times
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {
        name: (torch.tensor(values, dtype=torch.float64).quantile(quantiles) * 1e6).tolist()
        for name, values in times.items()
    }


def describe_machine() -> dict[str, str | int]:
    """What a row says of where it was taken."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": _name_cpu(),
        "commit": _name_commit(),
    }


def _name_cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _name_commit() -> str:
    """The commit, and `-dirty` if what is measured has changed since."""
    commit = _run_git("rev-parse", "--short", "HEAD")
    changes = _run_git("status", "--porcelain", "--", "csrc", "realign_kernels", "bench", ":!bench/results")
    return f"{commit or 'unknown'}{'-dirty' if changes else ''}"


def _run_git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
