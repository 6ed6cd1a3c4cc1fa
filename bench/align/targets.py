"""What is to be reached; judged by `bench.generate.targets`."""

from __future__ import annotations

from bench.align.rows import ITERATION, SCORING, AlignRow
from bench.generate.targets import Target


def _times(row: AlignRow, rows: object) -> float:
    return row.times_faster


def _images_per_s(row: AlignRow, rows: object) -> float:
    return row.images_per_s


def _samples_per_s(row: AlignRow, rows: object) -> float:
    return row.samples_per_s


CPU_TARGETS = (
    Target("an iteration, times the reference trainers' way", ITERATION, ("unguided",), _times, 4),
)
GPU_TARGETS = (
    Target(
        "rollouts without chains, images a second", ITERATION, ("guided on every step",), _images_per_s, 1.5
    ),
    Target("ViT-L/14 scoring of 1024x1024, pictures a second", SCORING, ("1024x1024",), _samples_per_s, 2000),
)
