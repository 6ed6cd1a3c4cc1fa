"""Rows of `results/align.jsonl`: a line for each workload, variant and implementation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

ITERATION, SCORING = "iteration", "clip"
ROLLOUT_PHASES = ("reading", "rereading", "denoising", "autoencoder", "other")


@dataclass(frozen=True, kw_only=True)
class AlignRow:
    """What was measured.

    Attributes:
        variant: guidance of the iteration; pixels of the pictures that are scored.
        what: sizes of the workload, in words.
        samples, chains: of the iteration, and how many of their texts differ.
        seconds: the median of `turn_seconds`.
        turn_seconds: of each turn; turns of engine and baseline alternate.
        samples_per_s: over the whole iteration.
        images_per_s: over the seconds of rollouts but the chains': `ROLLOUT_PHASES`.
        tokens, tokens_per_s: of all chains, and over the seconds of reasoning alone.
        phases: seconds, medians over turns: see `bench.align.ours`.
        peak_memory_mb: on CUDA what torch had allocated, else what the process held at most.
        times_faster, cpu_times_faster: the baseline's time over this one's, and the same of the process's
            processor time: medians over pairs of turns; 0 without a baseline.
        phase_times_faster: the same of each phase's seconds, those of both that are not 0.
        agreement: how far the two are apart, see `bench.align.outcome.Agreement`.
        first_ratio_error: how far the first ratios were off one.
        tflop_per_s: of the work that is needed (see `flops.py`), all phases.
        matmul_tflop_per_s, matrix_share: see `bench.generate.rows`.
    """

    workload: str
    variant: str
    impl: str
    model: str
    dtype: str
    what: str
    samples: int
    chains: int
    seconds: float
    turn_seconds: list[float]
    samples_per_s: float
    images_per_s: float
    tokens: int
    tokens_per_s: float
    phases: dict[str, float]
    peak_memory_mb: float
    times_faster: float
    cpu_times_faster: float
    phase_times_faster: dict[str, float]
    agreement: dict[str, float]
    first_ratio_error: float
    tflop_per_s: float
    matmul_tflop_per_s: float
    matrix_share: float
    command: str
    machine: str
    threads: int
    torch: str
    commit: str


def read_rows(path: Path) -> list[AlignRow]:
    """The rows of a file, in the order they were taken."""
    return [AlignRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
