"""Prompt files: a prompt a line (.txt), interleaved prompts (.jsonl), or GenEval's own metadata file.

Everything that can be wrong with a file is found here, before any work: `read_prompts` checks every line,
`load_references` every picture. An error is a `PromptError`, one line `FILE:LINE: what; how to mend`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from realign.data.images import load_picture

FORMATS = ("txt", "jsonl", "geneval")
MAX_SEED = 2**63 - 1
MAX_ID_BYTES = 200
ID_PATTERN = re.compile(r"\w[\w.-]*")
# Names that Windows keeps for devices, with any extension.
RESERVED_NAMES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10)),
}


class PromptError(ValueError):
    """A prompt file that cannot be used; the text is `FILE:LINE: what; how to mend`."""


@dataclass(frozen=True)
class TextEntry:
    """A text part of a prompt."""

    text: str


@dataclass(frozen=True)
class PictureEntry:
    """A reference picture of a prompt: as the file names it, and where that is."""

    name: str
    path: Path


@dataclass(frozen=True)
class PromptEntry:
    """One prompt of a file: its id (also its file name), parts in order, own seed if any, line number from 1.

    `source` is the line as it stands in the file (GenEval's layout repeats it).
    """

    id: str
    parts: tuple[TextEntry | PictureEntry, ...]
    seed: int | None
    line: int
    source: str

    @property
    def texts(self) -> list[str]:
        return [part.text for part in self.parts if isinstance(part, TextEntry)]

    @property
    def pictures(self) -> list[PictureEntry]:
        return [part for part in self.parts if isinstance(part, PictureEntry)]


@dataclass(frozen=True)
class PromptFile:
    """A checked prompt file: path as given, format, SHA-256 of its bytes, prompts in order."""

    path: Path
    format: str
    sha256: str
    entries: tuple[PromptEntry, ...]


@dataclass(frozen=True)
class _Line:
    file: Path
    number: int
    text: str

    def error(self, what: str) -> PromptError:
        return PromptError(f"{self.file}:{self.number}: {what}")


def read_prompts(path: str | Path, format: str = "auto") -> PromptFile:
    """Read and check the prompt file `path`; `format` is auto (by extension), txt, jsonl or geneval.

    Pictures are not opened here; see `load_references`. Raises PromptError.
    """
    path = Path(path)
    content = _read_file(path)
    format = _choose_format(path, format)
    lines = list(_decode_lines(path, content))
    if format == "geneval":
        lines = _drop_last_blank(lines)
    else:
        lines = [line for line in lines if line.text.strip()]
    if not lines:
        raise PromptError(f"{path}:1: the file has no prompts; write one a line")
    parse = {"txt": _parse_txt, "jsonl": _parse_jsonl, "geneval": _parse_geneval}[format]
    entries = tuple(parse(line, index) for index, line in enumerate(lines))
    _check_ids(path, entries)
    return PromptFile(path, format, hashlib.sha256(content).hexdigest(), entries)


@dataclass(frozen=True)
class Reference:
    """A reference picture that was opened and is fine: SHA-256 of its file, (width, height) in pixels."""

    sha256: str
    size: tuple[int, int]


def load_references(prompts: PromptFile) -> dict[Path, Reference]:
    """Open every reference picture once; what it is, by path. Raises PromptError."""
    references: dict[Path, Reference] = {}
    for entry in prompts.entries:
        for part in entry.pictures:
            if part.path in references:
                continue
            try:
                picture = load_picture(part.path)
            except ValueError as error:
                raise PromptError(f"{prompts.path}:{entry.line}: {error}") from error
            references[part.path] = Reference(picture.sha256, picture.image.size)
    return references


def quote(value: object, limit: int = 60) -> str:
    """A value for an error message: on one line, quoted, shortened."""
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def _read_file(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise PromptError(f"{path}:1: not a regular file; name a .txt or .jsonl file of prompts")
    try:
        return path.read_bytes()
    except OSError as error:
        raise PromptError(
            f"{path}:1: cannot be read ({error.strerror}); check the path of the prompt file"
        ) from error


def _choose_format(path: Path, format: str) -> str:
    if format in FORMATS:
        return format
    if format != "auto":
        raise PromptError(f"{path}:1: unknown format {quote(format)}; one of auto, {', '.join(FORMATS)}")
    by_extension = {".txt": "txt", ".jsonl": "jsonl"}
    extension = path.suffix.lower()
    if extension not in by_extension:
        raise PromptError(
            f"{path}:1: the extension {quote(extension)} tells no format; add --format txt, jsonl or geneval"
        )
    return by_extension[extension]


def _decode_lines(path: Path, content: bytes) -> Iterator[_Line]:
    """Lines end at \\n or \\r\\n only; a prompt may hold other Unicode line ends. A BOM is dropped."""
    raw_lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, raw in enumerate(raw_lines, start=1):
        try:
            yield _Line(path, number, raw.decode("utf-8").removesuffix("\r"))
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1})"
            raise PromptError(f"{path}:{number}: {what}; save the file as UTF-8") from error


def _drop_last_blank(lines: list[_Line]) -> list[_Line]:
    """In GenEval's file lines number the folders: a blank one is an error unless nothing follows."""
    while lines and not lines[-1].text.strip():
        lines.pop()
    return lines


def _parse_txt(line: _Line, index: int) -> PromptEntry:
    return PromptEntry(f"{index:05d}", (_text_entry(line, line.text.strip()),), None, line.number, line.text)


def _parse_jsonl(line: _Line, index: int) -> PromptEntry:
    row = _parse_object(line)
    if "id" not in row and {"tag", "include"} <= row.keys():
        raise line.error("this is GenEval's metadata, not {'id', 'prompt'}; add --format geneval")
    _check_fields(line, row, required=("id", "prompt"), optional=("seed",))
    parts = _parse_parts(line, row["prompt"])
    return PromptEntry(
        _parse_id(line, row["id"]), parts, _parse_seed(line, row.get("seed")), line.number, line.text
    )


def _parse_geneval(line: _Line, index: int) -> PromptEntry:
    row = _parse_object(line)
    _check_fields(line, row, required=("tag", "include", "prompt"), optional=("exclude",))
    if not isinstance(row["tag"], str):
        raise line.error(f"'tag' is {quote(row['tag'])}; it must be text")
    for name in ("include", "exclude"):
        if not isinstance(row.get(name, []), list):
            raise line.error(f"'{name}' is {quote(row[name])}; it must be a list")
    if not isinstance(row["prompt"], str):
        raise line.error(f"'prompt' is {quote(row['prompt'])}; GenEval's prompts are text")
    return PromptEntry(f"{index:05d}", _parse_parts(line, row["prompt"]), None, line.number, line.text)


def _parse_object(line: _Line) -> dict:
    try:
        row = json.loads(line.text, object_pairs_hook=_unique_pairs, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        what = f"broken JSON at column {error.colno} ({error.msg})"
        raise line.error(f"{what}; each line must be one JSON object") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise line.error(f"broken JSON ({reason}); each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise line.error(f"the line is {quote(row)}; each line must be one JSON object")
    return row


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {quote(twice)} stands twice")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_fields(line: _Line, row: dict, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    known = required + optional
    for name in row:
        if name not in known:
            raise line.error(f"unknown field {quote(name)}; the fields are {', '.join(known)}")
    for name in required:
        if name not in row:
            raise line.error(f"the field '{name}' is missing; the fields are {', '.join(known)}")


def _parse_parts(line: _Line, prompt: object) -> tuple[TextEntry | PictureEntry, ...]:
    if isinstance(prompt, str):
        return (_text_entry(line, prompt),)
    if not isinstance(prompt, list):
        raise line.error(f"'prompt' is {quote(prompt)}; it must be text or a list of parts")
    if not prompt:
        raise line.error("'prompt' is an empty list; add a text part")
    parts = tuple(_parse_part(line, part) for part in prompt)
    if not any(isinstance(part, TextEntry) for part in parts):
        raise line.error("the prompt has pictures but no text; add a text part that says what to draw")
    return parts


def _parse_part(line: _Line, part: object) -> TextEntry | PictureEntry:
    if not isinstance(part, dict):
        raise line.error(f"a part is {quote(part)}; it must be {{'text': ...}} or {{'image': ...}}")
    if len(part) != 1 or not part.keys() <= {"text", "image"}:
        raise line.error(
            f"a part has the fields {quote(sorted(part))}; it must have either 'text' or 'image'"
        )
    [(kind, value)] = part.items()
    if not isinstance(value, str):
        raise line.error(f"'{kind}' is {quote(value)}; it must be text")
    return _text_entry(line, value) if kind == "text" else _picture_entry(line, value)


def _text_entry(line: _Line, text: str) -> TextEntry:
    if not text.strip():
        raise line.error("a text is empty; write what to draw")
    _check_unicode(line, text)
    return TextEntry(text)


def _picture_entry(line: _Line, name: str) -> PictureEntry:
    _check_unicode(line, name)
    if not name.strip() or "\0" in name:
        raise line.error(f"'image' is {quote(name)}; name a picture file, relative to the prompt file")
    return PictureEntry(name, line.file.parent / name)


def _check_unicode(line: _Line, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"text with half a surrogate pair (\\u{ord(text[error.start]):04x})"
        raise line.error(f"{what}; write the whole character") from error


def _parse_seed(line: _Line, seed: object) -> int | None:
    if seed is None:
        return None
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise line.error(f"'seed' is {quote(seed)}; it must be a whole number from 0 to {MAX_SEED}")
    return seed


def _parse_id(line: _Line, value: object) -> str:
    if not isinstance(value, str):
        raise line.error(f"'id' is {quote(value)}; it must be text")
    if (
        not ID_PATTERN.fullmatch(value)
        or len(value.encode("utf-8", "replace")) > MAX_ID_BYTES
        or value.endswith(".")
    ):
        rule = f"letters, digits, '_', '-', '.', not first or last a '.', at most {MAX_ID_BYTES} bytes"
        raise line.error(f"the id {quote(value)} cannot be a file name; use {rule}")
    if value.split(".")[0].lower() in RESERVED_NAMES:
        raise line.error(f"the id {quote(value)} is a device's name on Windows; use another")
    return value


def _check_ids(path: Path, entries: tuple[PromptEntry, ...]) -> None:
    """Ids become file names, and must differ even where case or the spelling of an accent does not count."""
    seen: dict[str, PromptEntry] = {}
    for entry in entries:
        key = unicodedata.normalize("NFKC", entry.id).casefold()
        first = seen.setdefault(key, entry)
        if first is entry:
            continue
        what = f"the id {quote(entry.id)} is on line {first.line} already"
        if first.id != entry.id:
            both = f"{quote(entry.id)} and {quote(first.id)} (line {first.line})"
            what = f"the ids {both} are one file name on some systems"
        raise PromptError(f"{path}:{entry.line}: {what}; give each prompt its own id")
