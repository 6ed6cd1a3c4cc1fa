"""`python -m bench.tables`: the README's tables, made from the rows in `bench/results`.

A table stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`, and is written anew; a test holds
that nothing would change.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.align.rows import ITERATION, SCORING, AlignRow
from bench.align.rows import read_rows as read_align_rows
from bench.generate.baseline import list_steps
from bench.generate.rows import BASELINE, ENGINE, GenerateRow, keep_latest, read_rows
from bench.generate.workloads import CHAIN_TOKENS, CHAINS
from bench.quality import WAYS, Way
from bench.rows import RESULTS
from realign.runtime.forecast import StepNeeds, plan_steps
from realign.runtime.settings import Settings
from train.ablation.report import format_markdown

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)
CHIPS = ("H20", "H100", "H200", "B200")
MEASURED = "H200"

Row = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--readme", type=Path, default=README, help="the page that is written")
    options = parser.parse_args(arguments)
    before = options.readme.read_text(encoding="utf-8")
    try:
        after = fill(before)
    except KeyError as error:
        print(
            f"bench.tables: {options.readme} asks for rows {error}: not one of {', '.join(TABLES)}",
            file=sys.stderr,
        )
        return 2
    options.readme.write_text(after, encoding="utf-8")
    print(f"{options.readme}: {'as it was' if after == before else 'written'}")
    return 0


def fill(page: str) -> str:
    """The page with its tables as the rows are now. Raises: KeyError for a table there is none of."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


def format_rate(rate: float) -> str:
    """Three digits; from a thousand on in hundreds."""
    return f"{rate:.3g}" if rate < 1000 else f"{round(rate, -2):,.0f}"


def format_share(share: Mapping[str, Any], name: str = "all_right") -> str:
    """A share and its standard error."""
    return f"{share[name]:.3f} +- {share['se']:.3f}".replace("0.", ".")


def read_json(name: str) -> list[Row]:
    """The rows of a file."""
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# What a line says, the workload's name and variant, and which times it compares.
GENERATION = (
    (
        "W3: 24 samples of a prompt with four references, 15 timesteps, unguided",
        "W3",
        "unguided",
        "times_faster",
    ),
    ("the same, guided", "W3", "guided", "times_faster"),
    ("W3t: the same without references, unguided", "W3t", "unguided", "times_faster"),
    ("the same, guided on every step", "W3t", "guided on every step", "times_faster"),
    (
        "W4: 32 reasoning chains for a prompt with three references, unguided",
        "W4",
        "unguided",
        "text_times_faster",
    ),
    ("their pictures, chains apart", "W4", "unguided", "picture_times_faster"),
    ("the same, guided", "W4", "guided", "picture_times_faster"),
    (
        "`realign generate` of GenEval's 553 prompts, 50 timesteps",
        "geneval",
        "553 prompts of GenEval",
        "times_faster",
    ),
)


def build_generation() -> str:
    """mini on a CPU against the reference's algorithm."""
    rows = {
        (row.workload, row.variant, row.impl): row
        for row in keep_latest(read_rows(RESULTS / "generate.jsonl"))
        if row.model == "mini"
    }
    lines = []
    for label, workload, variant, comparison in GENERATION:
        pair = [rows[workload, variant, impl] for impl in (ENGINE, BASELINE)]
        figures = [_format_pace(row, comparison) for row in pair]
        lines.append((label, *figures, f"{getattr(pair[0], comparison):.3g}"))
    return format_markdown([("mini, two CPU cores", "ours", "baseline", "times"), *lines])


def _format_pace(row: GenerateRow, comparison: str) -> str:
    if comparison == "text_times_faster":
        return f"{format_rate(row.tokens_per_s)} tokens/s"
    if comparison == "picture_times_faster":
        seconds = sum(row.phases[name] for name in ("rereading", "denoising", "autoencoder"))
        return f"{format_rate(row.images / seconds)} images/s"
    return f"{format_rate(row.images_per_s)} images/s"


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
    place: tuple[str, str]
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
    Limit("the same, fp8", ("W1", "batch 1"), lambda row: 1 / row["fp8_images_per_s"], "5.5"),
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
ALIGN_PLACES = {
    (ITERATION, "guided on every step"): ("RGA", "LoRA, guided on every step"),
    (SCORING, "1024x1024"): ("CLIP", "ViT-L/14, 1024x1024"),
}


def build_limits() -> str:
    """BAGEL-7B: the least times by chip, what is wanted, what was measured."""
    computed = {(row["workload"], row["variant"], row["chip"]): row for row in read_json("roofline.jsonl")}
    measured = find_measured()
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


def find_measured() -> dict[tuple[str, str], GenerateRow | AlignRow]:
    """Rows of ours on the chip that targets are for, by their place in the roofline's."""
    generated = [row for row in read_rows(RESULTS / "generate.jsonl") if row.impl == ENGINE]
    found: dict[tuple[str, str], GenerateRow | AlignRow] = {
        (row.workload, row.variant): row for row in generated if MEASURED in row.machine
    }
    for row in read_align_rows(RESULTS / "align.jsonl"):
        place = ALIGN_PLACES.get((row.workload, row.variant))
        if place is not None and row.impl == ENGINE and MEASURED in row.machine:
            found[place] = row
    return found


def build_quality() -> str:
    """What faster ways to draw cost."""
    lines = [
        (
            f"`{describe_way(WAYS[row['way']])}`",
            str(count_runs(WAYS[row["way"]])),
            f"{row['psnr_mean']:.1f}, {row['psnr_worst']:.1f}",
            f"{row['velocity_error_mean']:.1%}",
            f"{row['all_right'][1]:.3f}",
        )
        for row in {row["way"]: row for row in read_json("quality.jsonl") if row["model"] == "mini"}.values()
    ]
    plain = count_runs(Way())
    columns = ("", f"branch runs of {plain}", "PSNR mean, worst (dB)", "velocity error", "all-right")
    return format_markdown([columns, *lines])


def describe_way(way: Way) -> str:
    """The options of `realign generate` that ask for it."""
    caching, plain = way.caching, Way().caching
    words = ["--fp8"] if way.fp8 else []
    for name in ("interval", "order"):
        if getattr(caching, name) != getattr(plain, name):
            words.append(f"--cache-{name} {getattr(caching, name)}")
    if caching.reuse_guidance_below:
        words.append(f"--reuse-guidance-below {caching.reuse_guidance_below:g}")
    return " ".join(words)


def count_runs(way: Way) -> int:
    """Branches that run for a text-to-image picture of `realign generate`'s own settings."""
    kinds = {True: ("conditional", "text_unconditional"), False: ("conditional",)}
    needs = [StepNeeds(t, kinds[is_guided]) for t, _, is_guided in list_steps(Settings())]
    return sum(len(plan.computed) for plan in plan_steps(needs, way.caching))


def build_world() -> str:
    """mini on its world's test scenes."""
    (row,) = read_json("world.json")
    lines = [("text-to-image", format_share(row["t2i"]), "", "", "")]
    stayed = f"{row['edit']['ic-cot']['preserved']:.3f}".replace("0.", ".")
    tasks = {"in_context": "in-context generation", "edit": f"editing (what must stay, stayed: {stayed})"}
    for task, label in tasks.items():
        plain, reasoned = row[task]["none"], row[task]["ic-cot"]
        lines.append(
            (
                label,
                format_share(plain),
                f"**{format_share(reasoned)}**",
                f"+{format_share(row['margin'][task])}",
                f"{reasoned['reasoning_correct']:.3f}",
            )
        )
    columns = (
        "task",
        "without reasoning: all-right",
        "with its own IC-CoT: all-right",
        "reasoning adds (paired)",
        "IC-CoT parsed and correct",
    )
    return format_markdown([columns, *lines])


RANKED = {
    "attributes": "shape, colour, size, place or background",
    "shape": "shape",
    "colour": "colour",
    "size": "size",
    "place": "place",
    "background": "background",
    "swapped_colours": "two objects' colours swapped",
}


def build_ranking() -> str:
    """The mini CLIP on pictures with a single thing wrong."""
    (row,) = read_json("clip.json")
    sorts = ("rendered", "decoded", "generated")
    lines = [
        (label, *(f"{row[sort][kind]['right']:.3f}".replace("0.", ".") for sort in sorts))
        for kind, label in RANKED.items()
    ]
    return format_markdown([("wrong in", "rendered", "through the autoencoder", "generated"), *lines])


TABLES = {
    "generation": build_generation,
    "limits": build_limits,
    "quality": build_quality,
    "world": build_world,
    "ranking": build_ranking,
}


if __name__ == "__main__":
    sys.exit(main())
