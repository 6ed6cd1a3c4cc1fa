"""In-Context Chain-of-Thought: what the picture will show, and what each reference gives.

Source: Re-Align, arXiv 2601.05124. Two forms are in use: tags, which are written here and trained on,

    <out_caption>a red star on a beach</out_caption><relation_1>the star is from image 1.</relation_1>

and JSON with the same names, `{"out_caption": "..", "relations": [{"relation_1": ".."}]}`. Both are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TAG = re.compile(r"<(/?)(out_caption|relation_\d+)>")
FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n\s*```\Z", re.DOTALL)
RELATION = re.compile(r"relation_([1-9]\d*)")


@dataclass(frozen=True)
class ICCoT:
    """`caption`: what the picture shows. `relations`: for each reference, in order, what the picture has from
    it.
    """

    caption: str
    relations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, text in (("out_caption", self.caption), *_numbered(self.relations)):
            if not text.strip():
                raise ValueError(f"IC-CoT {name} is empty: it must be text")
            if TAG.search(text):
                raise ValueError(f"IC-CoT {name} has the tag {TAG.search(text).group()!r} in its text")


def format_iccot(iccot: ICCoT) -> str:
    """The tag form, one line, as `parse_iccot` reads it back."""
    parts = (("out_caption", iccot.caption), *_numbered(iccot.relations))
    return "".join(f"<{name}>{text}</{name}>" for name, text in parts)


def parse_iccot(text: str, num_references: int | None = None) -> ICCoT:
    """Read an IC-CoT in either form.

    Args:
        text: the whole reasoning text; space around it, and between tags, is ignored.
        num_references: how many relations there must be; None accepts any number.

    Raises: ValueError that says what is wrong.
    """
    stripped = text.strip()
    fenced = FENCE.match(stripped)
    if fenced:
        stripped = fenced.group(1).strip()
    iccot = _read_json(stripped) if stripped.startswith("{") else _read_tags(stripped)
    if num_references is not None and len(iccot.relations) != num_references:
        raise ValueError(
            f"IC-CoT has {len(iccot.relations)} relations for {num_references} references: one each is needed"
        )
    return iccot


def _numbered(relations: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(f"relation_{number}", relation) for number, relation in enumerate(relations, 1)]


def _read_tags(text: str) -> ICCoT:
    """Walk from tag to tag: an opening one, its text, its closing one, and only space before the next."""
    fields: dict[str, str] = {}
    position = 0
    while position < len(text):
        opening = TAG.search(text, position)
        stray = text[position : opening.start() if opening else None].strip()
        if stray:
            raise ValueError(f"IC-CoT has text outside its tags: {_excerpt(stray)}")
        if opening is None:
            break
        name = opening.group(2)
        closing = TAG.search(text, opening.end())
        if opening.group(1) or closing is None or closing.groups() != ("/", name):
            found = closing.group() if closing else "the end"
            raise ValueError(f"IC-CoT tag {opening.group()} is not closed by </{name}>: {found} follows")
        if name in fields:
            raise ValueError(f"IC-CoT has <{name}> twice")
        fields[name] = text[opening.end() : closing.start()]
        position = closing.end()
    return _build(fields)


def _read_json(text: str) -> ICCoT:
    try:
        content = json.loads(text, object_pairs_hook=_unique_pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"IC-CoT is broken JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("IC-CoT is broken JSON: nested too deeply") from None
    unknown = sorted(content.keys() - {"out_caption", "relations"})
    if unknown:
        raise ValueError(
            f"IC-CoT has the unknown field {unknown[0]!r}: out_caption and relations are the fields"
        )
    relations = content.get("relations", [])
    if not isinstance(relations, list) or not all(
        isinstance(item, dict) and len(item) == 1 for item in relations
    ):
        raise ValueError(
            f'IC-CoT relations are {_excerpt(relations)}: must be a list such as [{{"relation_1": ".."}}]'
        )
    fields = {"out_caption": content["out_caption"]} if "out_caption" in content else {}
    for item in relations:
        name, relation = next(iter(item.items()))
        if name in fields:
            raise ValueError(f"IC-CoT has {name!r} twice")
        fields[name] = relation
    return _build(fields)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"IC-CoT has the field {name!r} twice")
    return dict(pairs)


def _build(fields: Mapping[str, Any]) -> ICCoT:
    """From the caption and relations by name; relations may come in any order, numbered 1 to their count."""
    if "out_caption" not in fields:
        raise ValueError("IC-CoT has no out_caption")
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"IC-CoT {name} is {_excerpt(value)}: must be text")
        if name != "out_caption" and not RELATION.fullmatch(name):
            raise ValueError(
                f"IC-CoT has the unknown relation {name!r}: relation_1, relation_2, ... are the names"
            )
    count = len(fields) - 1
    missing = [f"relation_{number}" for number in range(1, count + 1) if f"relation_{number}" not in fields]
    if missing:
        raise ValueError(
            f"IC-CoT has {count} relations but no {missing[0]}: they are numbered from 1 without gaps"
        )
    relations = tuple(fields[f"relation_{number}"].strip() for number in range(1, count + 1))
    return ICCoT(fields["out_caption"].strip(), relations)


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
