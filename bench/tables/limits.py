"""BAGEL-7B on GPUs: the least times, what is wanted, what was measured, what others published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.align.rows import ITERATION, SCORING, AlignRow
from bench.align.rows import read_rows as read_align_rows
from bench.align.workloads import LARGE_CLIP
from bench.generate.models import MODELS
from bench.generate.rows import ENGINE, GenerateRow, read_rows
from bench.generate.workloads import CHAIN_TOKENS, CHAINS
from bench.rows import RESULTS
from bench.tables.format import Row, format_rate, read_json
from train.ablation.report import format_markdown

CHIPS = ("H20", "H100", "H200", "B200")
MEASURED = "H200"
Place = tuple[str, str]  # a workload and its variant


@dataclass(frozen=True)
class Limit:
    """A line of the table of limits.

    Attributes:
        label: what it says.
        place: the workload and variant of its rows, in both files.
        computed: the figure of a row of the roofline's.
        wanted: on an H200.
        others: what others published, and of what.
        measured: the figure of a measured row, if there is one.
    """

    label: str
    place: Place
    computed: Callable[[Row], float]
    wanted: str = ""
    others: str = ""
    measured: Callable[[Any], float] | None = None


def _per_image(row: Row) -> float:
    return row["seconds"] / row["images"]


def _rate(row: Row) -> float:
    return row["images_per_s"]


def _rollout_rate(row: Row) -> float:
    phases = row["phases"]
    return row["images"] / sum(phases[name] for name in ("reading", "denoising", "autoencoder"))


def _token_rate(row: Row) -> float:
    return CHAINS * CHAIN_TOKENS / row["phases"]["reasoning"]


LIMITS = (
    Limit(
        "W1: 1024x1024, 50 timesteps, guided; seconds a picture",
        ("W1", "batch 1"),
        _per_image,
        "8.0",
        "10.0, H200, vLLM-Omni [1]",
        lambda row: row.seconds / row.images,
    ),
    Limit("the same, fp8 [3]", ("W1", "batch 1"), lambda row: 1 / row["fp8_images_per_s"], "5.5"),
    Limit(
        "W2: 512x512, 32 at a time; pictures/s",
        ("W2", "batch 32"),
        _rate,
        "70% of the products' rate",
        measured=lambda row: row.images_per_s,
    ),
    Limit(
        "W3: 24 samples, four references, 15 timesteps; pictures/s",
        ("W3", "unguided"),
        _rate,
        "2.2",
        measured=lambda row: row.images_per_s,
    ),
    Limit("the same, guided", ("W3", "guided"), _rate, measured=lambda row: row.images_per_s),
    Limit(
        "W3t: the same without references",
        ("W3t", "unguided"),
        _rate,
        "3.0",
        measured=lambda row: row.images_per_s,
    ),
    Limit(
        "the same, guided on every step",
        ("W3t", "guided on every step"),
        _rate,
        "1.5",
        ".59 to .75, GPU not named, verl-omni [2]",
        lambda row: row.images_per_s,
    ),
    Limit(
        "W4: 32 chains of 256 tokens, three references; tokens/s",
        ("W4", "unguided"),
        _token_rate,
        "10 times the baseline",
        measured=lambda row: row.tokens_per_s,
    ),
    Limit(
        "RGA: 24 samples of 512x512 with chains, LoRA; seconds an iteration",
        ("RGA", "LoRA, guided on every step"),
        lambda row: row["seconds"],
        measured=lambda row: row.seconds,
    ),
    Limit(
        "its rollouts without the chains; pictures/s",
        ("RGA", "LoRA, guided on every step"),
        _rollout_rate,
        "1.5",
        measured=lambda row: row.images_per_s,
    ),
    Limit(
        "ViT-L/14 scoring of 1024x1024; pictures/s",
        ("CLIP", "ViT-L/14, 1024x1024"),
        _rate,
        "2,000",
        measured=lambda row: row.samples_per_s,
    ),
)
# Of the rows of `bench.align`: their place in the roofline's, and the model.
ALIGN_PLACES = {
    (ITERATION, "guided on every step"): (("RGA", "LoRA, guided on every step"), MODELS[1]),
    (SCORING, "1024x1024"): (("CLIP", "ViT-L/14, 1024x1024"), LARGE_CLIP),
}


def build_limits() -> str:
    """BAGEL-7B: the least times by chip, what is wanted, what was measured."""
    computed = {(row["workload"], row["variant"], row["chip"]): row for row in read_json("roofline.jsonl")}
    measured = find_measured({(name, variant): row["images"] for (name, variant, _), row in computed.items()})
    lines = []
    for limit in LIMITS:
        least = [format_rate(limit.computed(computed[(*limit.place, chip)])) for chip in CHIPS]
        row = measured.get(limit.place) if limit.measured else None
        found = "not yet" if row is None else format_rate(limit.measured(row))
        lines.append((limit.label, *least, limit.wanted, found, limit.others))
    columns = (
        "BAGEL-7B, bf16",
        *(f"{chip}, limit" for chip in CHIPS),
        "wanted",
        "measured",
        "published by others",
    )
    return format_markdown([columns, *lines])


def find_measured(images: Mapping[Place, int]) -> dict[Place, GenerateRow | AlignRow]:
    """Rows of ours, whole ones of the right model on the chip that targets are for, by their place in the
    roofline's; `images`: how many each place has.
    """
    found: dict[Place, GenerateRow | AlignRow] = {}
    for row in read_rows(RESULTS / "generate.jsonl"):
        place = (row.workload, row.variant)
        if is_ours(row, MODELS[1]) and row.measured_images == images.get(place):
            found[place] = row
    for row in read_align_rows(RESULTS / "align.jsonl"):
        place, model = ALIGN_PLACES.get((row.workload, row.variant), (None, None))
        if place is not None and is_ours(row, model) and row.samples == images.get(place):
            found[place] = row
    return found


def is_ours(row: GenerateRow | AlignRow, model: str) -> bool:
    """In bf16, on the chip that targets are for."""
    is_same = row.model == model and row.dtype == "bfloat16" and MEASURED in row.machine
    return is_same and row.impl == ENGINE
