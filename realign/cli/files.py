"""Files that are whole or absent: written aside, synced, moved into place; and records, one JSON a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO
from uuid import uuid4

# Line ends to some readers, though not to JSON.
_LINE_ENDS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class Staging:
    """A hidden folder beside the files to be written, on the same disk, so that moving is atomic.

    `owner` is a name that no other process has, on this machine or another, nor had before.
    """

    def __init__(self, folder: Path) -> None:
        self.owner = uuid4().hex
        self._folder = folder
        self._count = 0

    def clear(self) -> None:
        """Make the folder, empty of what a killed process left."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()

    def new_path(self) -> Path:
        self._count += 1
        return self._folder / f"{self.owner}-{self._count}"

    def write(self, target: Path, write: Callable[[IO[bytes]], object]) -> None:
        """Let `write` fill a file that then becomes `target` at once."""
        self._folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        path = self.new_path()
        with path.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path, target)

    def write_text(self, target: Path, text: str) -> None:
        self.write(target, lambda file: file.write(text.encode("utf-8")))


def dump_line(record: object) -> str:
    """JSON on one line for every reader, ending in a newline."""
    text = json.dumps(record, ensure_ascii=False)
    for character, escape in _LINE_ENDS.items():
        text = text.replace(character, escape)
    return text + "\n"


def load_lines(path: Path) -> Iterator[dict]:
    """The objects of a JSON-lines file; a torn last line, or one that is no object, is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for raw in file:
            record = _parse_line(raw)
            if record is not None:
                yield record


def _parse_line(raw: bytes) -> dict | None:
    if not raw.endswith(b"\n"):
        return None
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
