"""mini on a CPU: speed, what faster ways cost, its world's test scenes, its CLIP, the ablation."""

from __future__ import annotations

from pathlib import Path

from bench.generate.baseline import list_steps
from bench.generate.rows import BASELINE, ENGINE, GenerateRow, read_rows
from bench.quality import WAYS, Way
from bench.rows import RESULTS
from bench.tables.format import Row, cut_zero, format_rate, format_share, read_json
from realign.runtime.forecast import StepNeeds, plan_steps
from realign.runtime.settings import Settings
from train.ablation.report import format_markdown

ABLATION = Path(__file__).parents[2] / "train/recipes/logs/ablation/table.md"

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
    measured = read_rows(RESULTS / "generate.jsonl")
    rows = {(row.workload, row.variant, row.impl): row for row in measured if is_of_two_cores(vars(row))}
    lines = []
    for label, workload, variant, comparison in GENERATION:
        pair = [rows[workload, variant, impl] for impl in (ENGINE, BASELINE)]
        figures = [_format_pace(row, comparison) for row in pair]
        lines.append((label, *figures, f"{getattr(pair[0], comparison):.3g}"))
    return format_markdown([("mini, two CPU cores", "ours", "baseline", "times"), *lines])


def is_of_two_cores(row: Row) -> bool:
    """mini in float32, on two threads of a CPU."""
    is_mini = row["model"] == "mini" and row["dtype"] == "float32"
    return is_mini and row["threads"] == 2 and "NVIDIA" not in row["machine"]


def read_result(benchmark: str) -> Row:
    """The last row of `bench.evals`."""
    return [row["result"] for row in read_json("evals.jsonl") if row["benchmark"] == benchmark][-1]


def _format_pace(row: GenerateRow, comparison: str) -> str:
    if comparison == "text_times_faster":
        return f"{format_rate(row.tokens_per_s)} tokens/s"
    if comparison == "picture_times_faster":
        seconds = sum(row.phases[name] for name in ("rereading", "denoising", "autoencoder"))
        return f"{format_rate(row.images / seconds)} images/s"
    return f"{format_rate(row.images_per_s)} images/s"


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
        for row in {row["way"]: row for row in read_json("quality.jsonl") if is_of_two_cores(row)}.values()
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
    row = read_result("world")
    lines = [("text-to-image", format_share(row["t2i"]), "", "", "")]
    stayed = cut_zero(row["edit"]["ic-cot"]["preserved"])
    tasks = {"in_context": "in-context generation", "edit": f"editing (what must stay, stayed: {stayed})"}
    for task, label in tasks.items():
        plain, reasoned = row[task]["none"], row[task]["ic-cot"]
        lines.append(
            (
                label,
                format_share(plain),
                f"**{format_share(reasoned)}**",
                format_share(row["margin"][task], sign="+"),
                cut_zero(reasoned["reasoning_correct"]),
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
    "missing": "an object missing",
    "extra": "an object too many",
    "swap": "two objects' colours swapped",
}


def build_ranking() -> str:
    """The mini CLIP on pictures with a single thing wrong."""
    row = read_result("clip")
    sorts = ("rendered", "decoded", "generated")
    lines = [
        (label, *(f"{cut_zero(row[sort][kind]['right'])} of {row[sort][kind]['n']}" for sort in sorts))
        for kind, label in RANKED.items()
    ]
    return format_markdown([("wrong in", "rendered", "through the autoencoder", "generated"), *lines])


def build_ablation() -> str:
    """As `make ablation` printed it, copied from its run's folder."""
    return ABLATION.read_text(encoding="utf-8").strip()
