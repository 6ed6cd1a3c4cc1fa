"""Rows of `results/generate.jsonl`: a line for each workload, variant and implementation.

`bench.rows.append_rows` writes them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ENGINE, BASELINE = "engine", "baseline"


@dataclass(frozen=True, kw_only=True)
class GenerateRow:
    """What was measured. Times are of all images, scaled up where fewer were made.

    Attributes:
        variant: see `Workload`.
        images, measured_images: of the workload, and how many of them were made in each turn.
        seconds: the median of `turn_seconds`.
        turn_seconds: of each turn; turns of engine and baseline alternate.
        tokens: of all texts that were written.
        tokens_per_s: over the seconds of reasoning alone.
        phases: seconds, medians over turns.
        peak_memory_mb: on CUDA what torch had allocated, else what the process held at most.
        times_faster: the baseline's time over this one's: the median over pairs of turns; 0 without it.
        cpu_times_faster: the same of the processor time of the process, all its threads: what a busy machine
            disturbs least, and where there is one thread what an idle machine would show.
        text_times_faster, picture_times_faster: the same of the seconds of reasoning, and of those of
            rereading, denoising and autoencoder (medians, not pairs); 0 without.
        latent_error: largest relative difference of final latents from the baseline's, over those pictures
            that both made.
        tflop_per_s: of the work that is needed (see `flops.py`), all phases; denoising_tflop_per_s: of one.
        matmul_tflop_per_s: of a large bf16 product on the device in the same run; 0 on a CPU.
        matrix_share, denoising_matrix_share: the former two over it.
        kernels_per_step, launches_per_step, syncs_per_step: of a denoising step, see `trace.py`; -1: not
            counted.
    """

    workload: str
    variant: str
    impl: str
    model: str
    dtype: str
    images: int
    measured_images: int
    images_per_s: float
    seconds: float
    turn_seconds: list[float]
    tokens: int
    tokens_per_s: float
    phases: dict[str, float]
    peak_memory_mb: float
    times_faster: float
    cpu_times_faster: float
    text_times_faster: float
    picture_times_faster: float
    latent_error: float
    tflop_per_s: float
    denoising_tflop_per_s: float
    matmul_tflop_per_s: float
    matrix_share: float
    denoising_matrix_share: float
    kernels_per_step: float
    launches_per_step: float
    syncs_per_step: float
    machine: str
    threads: int
    torch: str
    commit: str

    @property
    def key(self) -> tuple[str, str, str, str, str, int]:
        """What a later row of the same takes the place of."""
        return self.workload, self.variant, self.impl, self.model, self.machine, self.threads


def read_rows(path: Path) -> list[GenerateRow]:
    """The rows of a file, in the order they were taken."""
    return [GenerateRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def keep_latest(rows: Iterable[GenerateRow]) -> list[GenerateRow]:
    """Of rows of the same, the last."""
    return list({row.key: row for row in rows}.values())


def round_to(value: float, digits: int = 4) -> float:
    """So many significant digits."""
    return float(f"{value:.{digits}g}")


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over pairs of turns; 0 where there is nothing to divide by."""
    pairs = [a / b for a, b in zip(over, under, strict=True) if b > 0]
    return statistics.median(pairs) if pairs else 0.0
