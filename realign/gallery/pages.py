"""The HTML of a run: each prompt with its reference pictures in place, the reasoning, and what came of it.

Made from `run.json` and `records.jsonl` alone, at any time. All text is escaped; links are relative.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import count, groupby, takewhile
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined, Template

PAGE_SIZE = 500
# Pictures up to this many pixels a side are shown enlarged, pixel by pixel.
SMALL_PIXELS = 160
# The settings that the head of a page shows; all of them are in its fold-out.
HEAD_SETTINGS = ("reasoning", "steps", "text_guidance_scale", "image_guidance_scale", "seed")


def build_pages(
    run: Mapping[str, Any], records: Iterable[Mapping[str, Any]], page_size: int = PAGE_SIZE
) -> Iterator[tuple[str, str]]:
    """The pages of a run as (file name, HTML), the first of them `index.html`.

    Args:
        run: the content of `run.json`; what is in `facts` by name is shown at the head too, and `links` are
            relative addresses by what they are called.
        records: the content of `records.jsonl`, one mapping for each picture, those of a prompt together;
            each may have `scores`, numbers by name.
        page_size: a page ends with the prompt that reaches this many pictures.
    """
    pages = _paginate(
        [list(group) for _, group in groupby(records, key=lambda record: record["id"])], page_size
    )
    names = [page_name(number) for number in range(1, len(pages) + 1)]
    counts = _count(record for page in pages for group in page for record in group)
    for number, (name, groups) in enumerate(zip(names, pages, strict=True), start=1):
        html = _load_template().render(
            run_json=json.dumps(run, indent=2, ensure_ascii=False),
            head=_head(run),
            counts=counts,
            groups=groups,
            names=names,
            number=number,
            style=load_text("style.css"),
            links=run.get("links", {}),
        )
        yield name, html


def page_name(number: int) -> str:
    return "index.html" if number == 1 else f"index-{number}.html"


def _paginate(groups: Sequence[list], page_size: int) -> list[list[list]]:
    pages: list[list[list]] = [[]]
    filled = 0
    for group in groups:
        if filled >= page_size:
            pages.append([])
            filled = 0
        pages[-1].append(group)
        filled += len(group)
    return pages


def _count(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    counts = {"pictures": 0, "prompts": 0, "reasoned": 0, "failed": 0}
    last = None
    for record in records:
        counts["pictures"] += 1
        counts["prompts"] += record["id"] != last
        last = record["id"]
        reasoning = record.get("reasoning")
        counts["reasoned"] += reasoning is not None
        counts["failed"] += reasoning is not None and reasoning.get("error") is not None
    return counts


def _head(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = run.get("settings", {})
    model = run.get("model", {})
    shown = [("model", str(model.get("name", "?")))]
    shown += [(name.replace("_", " "), str(settings[name])) for name in HEAD_SETTINGS if name in settings]
    return shown + [(name, str(value)) for name, value in run.get("facts", {}).items()]


def _numbered(parts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The parts of a prompt, its pictures numbered from 1."""
    numbers = count(1)
    return [{**part, "number": next(numbers)} if "image" in part else dict(part) for part in parts]


def _split_opening(parts: Sequence[Mapping[str, Any]]) -> tuple[list, list]:
    """The pictures that come before any text, which get a line of their own, and the rest."""
    opening = list(takewhile(lambda part: "image" in part, parts))
    return opening, list(parts[len(opening) :])


def _references(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in record["prompt"] if "image" in part]


def is_small(picture: Mapping[str, Any]) -> bool:
    """Whether a picture is shown enlarged."""
    return max(picture["height"], picture["width"]) <= SMALL_PIXELS


def build_environment() -> Environment:
    """What the templates of this package are made with: all text is escaped, an unknown name is an error."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(link=quote, references=_references, numbered=_numbered, opening=_split_opening)
    environment.tests["small"] = is_small
    return environment


@cache
def _load_template() -> Template:
    return build_environment().from_string(load_text("page.html"))


@cache
def load_text(name: str) -> str:
    """A file of this package."""
    return files("realign.gallery").joinpath(name).read_text(encoding="utf-8")
