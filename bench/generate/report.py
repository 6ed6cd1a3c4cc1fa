"""What was measured, as rows."""

from __future__ import annotations

import shutil
import statistics
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.generate.measure import Measured, Run
from bench.generate.rows import BASELINE, ENGINE, GenerateRow, median_ratio, round_to
from bench.generate.trace import Counts
from bench.rows import name_commit, name_cpu

PICTURE_PHASES = ("rereading", "denoising", "autoencoder")
ROOT = Path(__file__).parents[2]
COMPARISONS = ("times_faster", "cpu_times_faster", "text_times_faster", "picture_times_faster")


@dataclass(frozen=True)
class Conditions:
    """What rows of one run have in common; `matmul_tflop_per_s` is 0 on a CPU."""

    model: str
    dtype: str
    machine: str
    threads: int
    matmul_tflop_per_s: float = 0.0
    torch: str = torch.__version__
    commit: str = field(default_factory=lambda: name_whole_commit())


def name_machine(device: torch.device) -> str:
    """The GPU or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else name_cpu()


def name_whole_commit() -> str:
    """The commit, and `-dirty` if anything that is measured here has changed since, `realign` and `train`
    included.
    """
    commit = name_commit()
    if commit.endswith("-dirty") or shutil.which("git") is None:
        return commit
    status = ["git", "status", "--porcelain", "--", "realign", "train"]
    changes = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return f"{commit}-dirty" if changes else commit


@dataclass(frozen=True)
class Report:
    """One workload: what was measured, the work that it needs, what a step of each run counts."""

    workload: str
    variant: str
    num_images: int
    measured: Measured
    flops: dict[str, int]
    counts: dict[str, Counts] = field(default_factory=dict)

    def make_rows(self, conditions: Conditions) -> list[GenerateRow]:
        """The engine's row, and the baseline's where there is one."""
        runs = {ENGINE: self.measured.engine, BASELINE: self.measured.baseline}
        return [self._make_row(name, run, conditions) for name, run in runs.items() if run is not None]

    def _make_row(self, name: str, run: Run, conditions: Conditions) -> GenerateRow:
        seconds, phases = statistics.median(run.seconds), run.median_phases
        whole = sum(self.flops.values()) / seconds / 1e12
        spent = phases["denoising"]
        denoising = self.flops.get("denoising", 0) / spent / 1e12 if spent else 0.0
        rate = conditions.matmul_tflop_per_s
        return GenerateRow(
            workload=self.workload,
            variant=self.variant,
            impl=name,
            images=self.num_images,
            measured_images=round(self.num_images / run.scale),
            images_per_s=round_to(self.num_images / seconds),
            seconds=round_to(seconds),
            turn_seconds=[round_to(turn) for turn in run.seconds],
            tokens=round(run.num_tokens),
            tokens_per_s=round_to(run.num_tokens / phases["reasoning"]) if phases["reasoning"] else 0.0,
            phases={phase: round_to(spent) for phase, spent in phases.items()},
            peak_memory_mb=round(run.peak_mb, 1),
            **self._compare(run),
            latent_error=round_to(self.measured.latent_error, 2),
            tflop_per_s=round_to(whole),
            denoising_tflop_per_s=round_to(denoising),
            matrix_share=round_to(whole / rate) if rate else 0.0,
            denoising_matrix_share=round_to(denoising / rate) if rate else 0.0,
            **{f"{what}_per_step": count for what, count in vars(self.counts.get(name, Counts())).items()},
            **vars(conditions),
        )

    def _compare(self, run: Run) -> dict[str, float]:
        """How many times faster than the baseline a run is."""
        base = self.measured.baseline
        if base is None:
            return dict.fromkeys(COMPARISONS, 0.0)
        theirs, ours = base.median_phases, run.median_phases
        ratios = (
            median_ratio(base.seconds, run.seconds),
            median_ratio(base.cpu_seconds, run.cpu_seconds),
            median_ratio([theirs["reasoning"]], [ours["reasoning"]]),
            median_ratio([_sum_pictures(theirs)], [_sum_pictures(ours)]),
        )
        return {name: round_to(ratio, 3) for name, ratio in zip(COMPARISONS, ratios, strict=True)}


def _sum_pictures(phases: dict[str, float]) -> float:
    return sum(phases[name] for name in PICTURE_PHASES)
