"""The ablation's table beside the paper's, what differs by how much, and rewards over steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from train.ablation.figure import draw_rewards
from train.ablation.plan import ALIGNED, BASE, PLAIN, REASONED, RID, SHARED, VARIANTS, Layout
from train.ablation.statistics import Estimate, estimate

TITLES = {
    BASE: "base",
    PLAIN: "(a) SFT without IC-CoT",
    REASONED: "(b) SFT with IC-CoT",
    SHARED: "(c) (b) + RGA, one shared chain",
    RID: "(d) (b) + RGA with RID",
}
COLUMNS = {
    "following": "prompt following",
    "consistency": "subject consistency",
    "overall": "overall",
    "overall_guided": "overall, guided",
    "all_right": "all right",
    "clip": "CLIP to the true caption",
    "own_caption": "CLIP to its own caption",
    "spread": "spread within groups",
    "distinct": "distinct chains",
}
PERCENT = ("all_right", "own_caption", "spread", "distinct")
# Re-Align (arXiv 2601.05124), its ablation: prompt following, subject consistency, overall, CLIPout
PAPER = {
    BASE: (6.92, 5.47, 5.80, 32.44),
    REASONED: (7.51, 6.46, 6.77, 33.32),
    SHARED: (7.46, 6.54, 6.80, 33.50),
    RID: (7.61, 6.57, 6.89, 33.90),
}
PAPER_COLUMNS = ("following", "consistency", "overall", "clip")
PAIRED_COLUMNS = (*PAPER_COLUMNS, "overall_guided", "all_right", "own_caption")
PAIRS = ((REASONED, PLAIN), (SHARED, REASONED), (RID, REASONED), (RID, SHARED))
Table = dict[str, np.ndarray]  # by column: [seeds, scenes or groups]


def write_report(layout: Layout, num_seeds: int) -> str:
    """Writes table.md, summary.json and rewards.png into the run's folder. Returns: the table."""
    tables = {variant: read_measured(layout, variant, num_seeds) for variant in VARIANTS}
    text = "\n\n".join((format_table(tables), format_pairs(tables)))
    (layout.out / "table.md").write_text(f"{text}\n")
    (layout.out / "summary.json").write_text(json.dumps(summarise(tables), indent=1) + "\n")
    logs = {v: [layout.log(v, seed) for seed in range(num_seeds)] for v in ALIGNED}
    draw_rewards({TITLES[variant]: paths for variant, paths in logs.items()}, layout.out / "rewards.png")
    return text


def read_measured(layout: Layout, variant: str, num_seeds: int) -> Table:
    """What was measured of a variant's models; the base stands for each seed."""
    seeds = [0] if variant == BASE else range(num_seeds)
    found = [json.loads(layout.measured(variant, seed).read_text()) for seed in seeds]
    scale = {column: 100.0 if column in PERCENT else 1.0 for column in COLUMNS}
    return {c: scale[c] * np.asarray([one[c] for one in found]) for c in COLUMNS if c in found[0]}


def format_table(tables: dict[str, Table]) -> str:
    """Markdown, a line a variant, the paper's numbers in brackets."""
    rows = [["", *COLUMNS.values()]]
    for variant, table in tables.items():
        paper = dict(zip(PAPER_COLUMNS, PAPER.get(variant, ()), strict=False))
        cells = []
        for column in COLUMNS:
            said = str(estimate(table[column])) if column in table else ""
            cells.append(said + (f" [{paper[column]:.2f}]" if column in paper else ""))
        rows.append([TITLES[variant], *cells])
    return format_markdown(rows)


def format_pairs(tables: dict[str, Table]) -> str:
    """Markdown: differences on the same scenes and seeds, and how many standard errors they are."""
    rows = [["difference (paired)", *(COLUMNS[column] for column in PAIRED_COLUMNS)]]
    for better, worse in PAIRS:
        said = [format_difference(tables[better], tables[worse], column) for column in PAIRED_COLUMNS]
        rows.append([f"{TITLES[better][:3]} - {TITLES[worse][:3]}", *said])
    return format_markdown(rows)


def format_difference(better: Table, worse: Table, column: str) -> str:
    """Nothing where one of them does not have the column."""
    if not (column in better and column in worse):
        return ""
    found = compare(better, worse, column)
    return f"{found.mean:+.2f} +- {found.error:.2f} ({count_errors(found):+.1f} SE)"


def compare(better: Table, worse: Table, column: str) -> Estimate:
    """The mean difference."""
    return estimate(better[column] - worse[column])


def count_errors(one: Estimate) -> float:
    """A mean in its standard errors."""
    return one.mean / one.error if one.error > 0 else 0.0


def summarise(tables: dict[str, Table]) -> dict[str, dict[str, dict[str, float]]]:
    """All estimates, by variant and column, and of the differences."""
    found = {v: {c: asdict(estimate(values)) for c, values in table.items()} for v, table in tables.items()}
    for better, worse in PAIRS:
        shared = [column for column in tables[better] if column in tables[worse]]
        found[f"{better} - {worse}"] = {c: asdict(compare(tables[better], tables[worse], c)) for c in shared}
    return found


def format_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
