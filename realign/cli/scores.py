"""The scores of a run's pictures: `scores.jsonl` in its folder, a line for each picture and reward.

A line is appended whole and synced; what a kill tore off is left out by the next run, which goes on there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from realign.cli.files import Staging, dump_line, load_lines

SCORES = "scores.jsonl"

Key = tuple[str, str]  # a picture's request id, and the reward


def load_scores(folder: Path) -> dict[Key, dict[str, Any]]:
    """The scores of a folder; of several of one picture by one reward the last."""
    rows = load_lines(folder / SCORES)
    return {(row["request"], row["reward"]): row for row in rows if _is_score(row)}


def _is_score(row: Mapping[str, Any]) -> bool:
    numbers = (row.get("score"), *(row.get("parts") or {}).values()) if _has_parts(row) else (None,)
    names = (row.get("request"), row.get("reward"))
    return all(isinstance(n, int | float) for n in numbers) and all(isinstance(n, str) for n in names)


def _has_parts(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("parts"), dict)


def append_scores(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add lines, synced; the file's last line must be whole (see `settle_scores`)."""
    with (folder / SCORES).open("ab") as file:
        file.write("".join(map(dump_line, rows)).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def settle_scores(folder: Path, requests: Sequence[str], staging: Staging) -> None:
    """Make the file hold what `load_scores` gives and no more, in the order of the pictures."""
    places = {request: place for place, request in enumerate(requests)}
    rows = sorted(load_scores(folder).values(), key=lambda row: places.get(row["request"], len(places)))
    text = "".join(map(dump_line, rows))
    path = folder / SCORES
    if text if not path.exists() else path.read_bytes() != text.encode("utf-8"):
        staging.write_text(path, text)


def add_scores(records: Iterable[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The records of a run, each with its `scores`: numbers by reward."""
    found: dict[str, dict[str, float]] = {}
    for (request, reward), row in load_scores(folder).items():
        found.setdefault(request, {})[reward] = row["score"]
    return [{**record, "scores": found.get(str(record.get("request")), {})} for record in records]
