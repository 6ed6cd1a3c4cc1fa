"""The page of a training run's held-out evaluations: the reward over the steps, the same prompts over the
steps, and links to the pages of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Template

from realign.gallery.curve import Curve, draw_curves
from realign.gallery.pages import build_environment, is_small, load_text

NUM_STRIPS, NUM_COLUMNS = 6, 10

Records = Mapping[int, Sequence[Mapping[str, Any]]]


def build_index(
    rows: Sequence[Mapping[str, Any]],
    records: Records,
    training: Sequence[tuple[float, float]] = (),
    facts: Mapping[str, str] | None = None,
) -> str:
    """The page as HTML; it lies beside the evaluations' folders, `name_folder(step)`.

    Args:
        rows: of evaluations by rising step, at least one: `step`, `reward`, `se`, `seconds`; perhaps
            `gain`, `gain_se`, `rewards` (by term), `failures`.
        records: by step, those that `build_pages` shows, with `scores["reward"]`; may lack steps.
        training: (step, reward) of training, where it is of the same reward.
        facts: shown at the head.
    """
    held_out = Curve("held-out", [(row["step"], row["reward"]) for row in rows], [row["se"] for row in rows])
    steps = choose_steps([row["step"] for row in rows if row["step"] in records], NUM_COLUMNS)
    return _load_template().render(
        rows=rows,
        best=max(rows, key=lambda row: row["reward"]),
        facts=facts or {},
        curve=draw_curves([Curve("training", training, kind="training"), held_out], "reward over steps"),
        has_training=bool(training),
        steps=steps,
        strips=_build_strips(steps, records),
        terms=list(rows[-1].get("rewards", {})),
        has_failures=all("failures" in row for row in rows),
        folder=name_folder,
        style=load_text("style.css"),
    )


def name_folder(step: int) -> str:
    return f"step-{step:08d}"


def choose_steps(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, the first and the last among them, about evenly spread."""
    if len(steps) <= count:
        return list(steps)
    places = [round(number * (len(steps) - 1) / (count - 1)) for number in range(count)]
    return [steps[place] for place in places]


def _build_strips(steps: Sequence[int], records: Records) -> list[dict[str, Any]]:
    """The first picture of each of the first prompts, at each step."""
    firsts = {step: {r["id"]: r for r in records[step] if r["index"] == 0} for step in steps}
    prompts = list(dict.fromkeys(name for step in steps for name in firsts[step]))[:NUM_STRIPS]
    strips = []
    for name in prompts:
        shown = [_show(step, firsts[step].get(name)) for step in steps]
        step = next(step for step in steps if name in firsts[step])
        parts = firsts[step][name]["prompt"]
        references = [{**p, "image": f"{name_folder(step)}/{p['image']}"} for p in parts if "image" in p]
        texts = " ".join(part["text"] for part in parts if "text" in part)
        strips.append({"prompt": texts, "references": references, "pictures": shown})
    return strips


def _show(step: int, record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {
        "file": f"{name_folder(step)}/{record['file']}",
        "link": f"{name_folder(step)}/index.html",
        "alt": f"{record['id']} at step {step}",
        "is_small": is_small(record),
        "reward": record["scores"]["reward"],
    }


@cache
def _load_template() -> Template:
    return build_environment().from_string(load_text("evaluations.html"))
