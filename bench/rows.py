"""Rows: one JSON object a line, one measurement each. Times are microseconds for one call."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.case import OURS

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every row says.

    Attributes:
        gb_per_s: the bytes that the op must move at least, over the median time.
        times_faster: for every baseline of the case, its median time over this one, in the same run.
    """

    op: str
    impl: str
    shape: str
    dtype: str
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float
    times_faster: dict[str, float]
    torch: str
    commit: str


@dataclass(frozen=True, kw_only=True)
class CpuRow(Row):
    """A row of `python -m bench`."""

    cpu: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class GpuRow(Row):
    """A row of `python -m bench.gpu`.

    Attributes:
        copy_share: gb_per_s over copy_gb_per_s, the rate of a large copy on the device, in the same run.
        tflop_per_s: for matrix products, else 0; matmul_tflop_per_s: of a large bf16 one, in the same run.
        call_us: time of a call from Python, one after the other: what a program without graphs waits at most.
        method: "graph" (replay of a captured graph) or "events" (around calls, where it cannot be captured;
            times_faster then compares call_us).
        launches: nodes of one call's graph (kernels, copies, fills); 0 where it cannot be captured.
        input_sets: equal sets of inputs that took turns, so that none stays in the L2 cache.
    """

    copy_share: float
    tflop_per_s: float
    call_us: float
    method: str
    launches: int
    input_sets: int
    copy_gb_per_s: float
    matmul_tflop_per_s: float
    gpu: str
    driver: str
    triton: str


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile of times in microseconds."""

    p20_us: float
    median_us: float
    p80_us: float

    @classmethod
    def of(cls, times_us: Sequence[float]) -> Spread:
        """The spread of the times of single calls."""
        if len(times_us) == 1:
            return cls(*(times_us[0],) * 3)
        cuts = statistics.quantiles(times_us, n=10, method="inclusive")
        return cls(cuts[1], cuts[4], cuts[7])


def describe_times(spreads: dict[str, Spread], num_bytes: int) -> dict[str, dict[str, object]]:
    """For each run of a case, the fields of its row that follow from the times of all."""
    baselines = [name for name in spreads if name not in OURS]
    return {
        name: {
            "median_us": round(spread.median_us, 3),
            "p20_us": round(spread.p20_us, 3),
            "p80_us": round(spread.p80_us, 3),
            "gb_per_s": float(f"{num_bytes / spread.median_us / 1e3:.4g}"),
            "times_faster": {
                other: float(f"{spreads[other].median_us / spread.median_us:.3g}") for other in baselines
            },
        }
        for name, spread in spreads.items()
    }


def append_rows(rows: Iterable[Row], path: Path) -> None:
    """Add lines to the file, and the file and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def read_rows(path: Path) -> list[CpuRow] | list[GpuRow]:
    """The rows of a file, of the CPU or of a GPU, in the order they were taken."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(GpuRow if "gpu" in line else CpuRow)(**line) for line in lines]


def keep_latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows of the same op, run, shape and dtype (and number of threads), the last."""
    latest = {(row.op, row.impl, row.shape, row.dtype, getattr(row, "threads", None)): row for row in rows}
    return list(latest.values())


def name_cpu() -> str:
    """The processor's own name for itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def name_commit() -> str:
    """The commit, and `-dirty` if what is measured has changed since."""
    commit = _run_git("rev-parse", "--short", "HEAD")
    changes = _run_git("status", "--porcelain", "--", "csrc", "realign_kernels", "bench", ":!bench/results")
    return f"{commit or 'unknown'}{'-dirty' if changes else ''}"


def _run_git(*arguments: str) -> str:
    root = Path(__file__).parents[1]
    try:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        ).stdout.strip()
    except FileNotFoundError:  # a copy of the tree on a machine without git
        return ""
