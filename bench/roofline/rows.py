"""Rows of `results/roofline.jsonl`: the least time of a workload on a chip, computed and not measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.generate.rows import round_to
from bench.roofline.chips import Chip
from bench.roofline.estimate import Estimate


@dataclass(frozen=True)
class Line:
    """A workload, what tells it from others of the same name, its pictures, its work."""

    workload: str
    variant: str
    images: int
    estimate: Estimate


@dataclass(frozen=True, kw_only=True)
class RooflineRow:
    """What was computed; times are of all images.

    Attributes:
        images: that are made, or scored.
        pflop: operations, in 1e15.
        attention: its share of them.
        phases: seconds, those that are not 0.
        fp8_images_per_s: with the products of the generation expert in e4m3, but those of replays.
    """

    workload: str
    variant: str
    chip: str
    matrix_tflops: float
    bandwidth_tbs: float
    images: int
    pflop: float
    attention: float
    phases: dict[str, float]
    seconds: float
    images_per_s: float
    fp8_images_per_s: float

    @classmethod
    def of(cls, line: Line, chip: Chip) -> RooflineRow:
        """The row of a chip."""
        seconds = line.estimate.seconds(chip)
        fast = sum(line.estimate.seconds(chip, is_fp8=True).values())
        phases, whole = line.estimate.phases.values(), sum(seconds.values())
        flops = sum(phase.flops for phase in phases)
        return cls(
            workload=line.workload,
            variant=line.variant,
            chip=chip.name,
            matrix_tflops=chip.matrix_tflops,
            bandwidth_tbs=chip.bandwidth_tbs,
            images=line.images,
            pflop=round_to(flops / 1e15),
            attention=round_to(sum(phase.attention_flops for phase in phases) / flops),
            phases={name: round_to(value) for name, value in seconds.items() if value},
            seconds=round_to(whole),
            images_per_s=round_to(line.images / whole),
            fp8_images_per_s=round_to(line.images / fast),
        )


def write_rows(rows: Iterable[RooflineRow], path: Path, commit: str) -> None:
    """One JSON object a line, in place of what the file held: the same configuration gives the same rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row) | {"commit": commit}) + "\n" for row in rows)
