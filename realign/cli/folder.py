"""The folder of a run: locked to one launch, and at every instant fit for the next one to go on from.

Its rule: a picture is moved into place whole, with its record inside it, and only then is the record appended
to `records.jsonl`. So a kill leaves at most a torn last line and files in the hidden staging folder; a record
that is missing is taken from its picture, and a picture that is missing is made again.

Of several processes each appends to a file of its own in `.realign/records`, as appends from several machines
may overwrite each other; all are brought together in `records.jsonl` at the end, or by the next run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from realign.cli.claims import Claims, OwnClaims, SharedClaims
from realign.cli.console import RunError, UsageError, print_warning
from realign.cli.files import Staging, dump_line, load_lines
from realign.cli.layout import Layout, Task
from realign.cli.locks import FolderLock
from realign.cli.pngs import is_whole_png, load_metadata, save_png
from realign.cli.processes import ALONE, Process

HIDDEN = ".realign"
RECORDS = "records.jsonl"
REFERENCE_PIXELS = 1024


class RunFolder:
    """A run's pictures, records and settings on disk.

    Args:
        path: the folder; made by `open`, not before.
        layout: where the pictures lie.
        settings: what must be the same for a run to go on here, by name.
        process: this one; one of several does not have the folder to itself.
        allowed: names of entries that a new run may find in the folder.

    Attributes:
        claims: which batches are this process's; to be used while the folder is open.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        settings: Mapping[str, Any],
        process: Process = ALONE,
        allowed: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._layout = layout
        self._settings = dict(settings)
        self._allowed = allowed
        hidden = path / HIDDEN
        self._staging = Staging(hidden / "tmp")
        self._lock = FolderLock(path, hidden / "lock", process)
        alone = process.is_alone
        self.claims: Claims = OwnClaims() if alone else SharedClaims(path, hidden / "claims")
        self._records = path / RECORDS if alone else hidden / "records" / f"{self._staging.owner}.jsonl"

    @property
    def is_started(self) -> bool:
        return (self.path / "run.json").exists()

    def check(self) -> None:
        """Look, without writing, whether `open` would work. Raises UsageError."""
        try:
            exists = self.path.exists()
        except OSError as error:  # a name that is too long, say
            raise self._cannot_be_made(error) from error
        if exists and not self.path.is_dir():
            raise UsageError(f"--out {self.path}: is a file; name a folder")
        self._check_writable()
        if not self.path.exists():
            return
        check_empty(self.path, self._allowed)
        if self.is_started:
            self._check_settings()
            self._lock.check()

    @contextmanager
    def open(self, about: Mapping[str, Any], tasks: Sequence[Task]) -> Iterator[set[str]]:
        """Hold the folder for this launch; gives the request ids of the tasks that were done before it.

        The first process to come brings records and pictures in line, whatever happened; a new folder gets
        `run.json`: the settings, and what `about` says. Raises UsageError where a process of another run
        holds it, or it has another run.
        """
        self._make()
        with ExitStack() as held:
            held.enter_context(self.claims.opened())
            with self.claims.door():
                if held.enter_context(self._lock.hold()):
                    self._prepare(about)
                    done = self._reconcile(tasks)
                    self.claims.reset()
                else:
                    self._check_run(about)
                    done = {str(record.get("request")) for record in load_lines(self.path / RECORDS)}
            yield done & {task.request_id for task in tasks}

    def save_picture(self, task: Task, image: Image.Image, record: dict[str, Any]) -> None:
        """Put the picture in place, its settings and record in its metadata, then append the record."""
        self._make_prompt_folder(task)
        record = {"request": task.request_id, "file": self._layout.picture_file(task), **record}
        metadata = {"record": record, "settings": self._settings}
        self._staging.write(self.path / record["file"], lambda file: save_png(image, file, metadata))
        self._records.parent.mkdir(exist_ok=True)
        with self._records.open("ab") as file:
            file.write(dump_line(record).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def save_reference(self, sha256: str, image: Image.Image) -> str:
        """Keep a reference picture for the gallery, at most 1024 pixels a side; returns its relative name."""
        name = f"refs/{sha256[:16]}.png"
        if not (self.path / name).exists():
            small = image.copy()
            small.thumbnail((REFERENCE_PIXELS, REFERENCE_PIXELS))
            self._staging.write(self.path / name, lambda file: small.save(file, format="PNG"))
        return name

    def has_picture(self, task: Task) -> bool:
        """Whether the picture is there, whole and of this very run."""
        return self._recover_record(task) is not None

    def gather_records(self, tasks: Sequence[Task]) -> None:
        """When no process writes any more: all records in `records.jsonl`, in the prompts' order, and nothing
        that a killed process left. Raises RunError where a picture is missing.
        """
        self._staging.clear()
        records = load_records(self.path)
        self._add_recovered(records, tasks)
        missing = sum(task.request_id not in records for task in tasks)
        if missing:
            raise RunError(f"{missing} of {len(tasks)} pictures are missing")
        self._rewrite_records(records, tasks)

    def _prepare(self, about: Mapping[str, Any]) -> None:
        self._staging.clear()
        if self.is_started:
            self._check_run(about)
            return
        check_empty(self.path, self._allowed)
        run = {"made_by": "realign", **about, "settings": self._settings}
        self._staging.write_text(self.path / "run.json", json.dumps(run, indent=2, ensure_ascii=False) + "\n")

    def _reconcile(self, tasks: Sequence[Task]) -> set[str]:
        """Bring records and pictures in line, whatever happened; returns the request ids that are done."""
        records = self._find_records({task.request_id: task for task in tasks})
        self._add_recovered(records, tasks)
        self._rewrite_records(records, tasks)
        return set(records)

    def _make(self) -> None:
        try:
            (self.path / HIDDEN).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_be_made(error) from error

    def _cannot_be_made(self, error: OSError) -> UsageError:
        return UsageError(f"--out {self.path}: cannot be made ({error.strerror}); choose another")

    def _check_writable(self) -> None:
        place = self.path
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise UsageError(f"--out {self.path}: {place} is a file; name a folder elsewhere")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UsageError(f"--out {self.path}: {place} cannot be written to; choose another")

    def _check_settings(self) -> None:
        settings = load_run(self.path)["settings"]
        names = [*self._settings, *(name for name in settings if name not in self._settings)]
        differing = [name for name in names if settings.get(name) != self._settings.get(name)]
        if differing:
            shown = ", ".join(
                f"{n} was {_show(settings.get(n))}, is {_show(self._settings.get(n))}" for n in differing
            )
            raise UsageError(
                f"--out {self.path}: holds another run: {shown}; repeat its settings or name another folder"
            )

    def _check_run(self, about: Mapping[str, Any]) -> None:
        self._check_settings()
        self._warn_versions(about.get("versions", {}))

    def _warn_versions(self, versions: Mapping[str, str]) -> None:
        """Another library version may change a picture's last digits: worth a word, not a refusal."""
        before = load_run(self.path).get("versions", {})
        changed = [
            f"{n} {before[n]} then, {versions[n]} now"
            for n in versions
            if before.get(n, versions[n]) != versions[n]
        ]
        if changed:
            print_warning(
                f"{self.path} was begun with other versions ({', '.join(changed)}): pictures may differ"
            )

    def _find_records(self, planned: Mapping[str, Task]) -> dict[str, dict]:
        """The records whose picture is there and whole, by request id."""
        records: dict[str, dict] = {}
        for request_id, record in load_records(self.path).items():
            task = planned.get(request_id)
            if task is None or record.get("file") != self._layout.picture_file(task):
                continue
            if is_whole_png(self.path / record["file"]):
                records[task.request_id] = record
        return records

    def _add_recovered(self, records: dict[str, dict], tasks: Sequence[Task]) -> None:
        for task in tasks:
            if task.request_id not in records:
                record = self._recover_record(task)
                if record is not None:
                    records[task.request_id] = record

    def _recover_record(self, task: Task) -> dict | None:
        """The record inside a whole picture of this very run that was killed before it could append it."""
        path = self.path / self._layout.picture_file(task)
        if not is_whole_png(path):
            return None
        metadata = load_metadata(path)
        record = metadata.get("record")
        if metadata.get("settings") != self._settings or not isinstance(record, dict):
            return None
        return record if record.get("request") == task.request_id else None

    def _rewrite_records(self, records: Mapping[str, dict], tasks: Sequence[Task]) -> None:
        text = "".join(dump_line(records[task.request_id]) for task in tasks if task.request_id in records)
        path = self.path / RECORDS
        if not path.exists() or path.read_bytes() != text.encode("utf-8"):
            self._staging.write_text(path, text)
        for part in _list_parts(self.path):
            part.unlink()

    def _make_prompt_folder(self, task: Task) -> None:
        """A folder that readers take as a whole appears at once, with all its files."""
        wanted = self._layout.prompt_folder(task)
        if wanted is None or (self.path / wanted[0]).exists():
            return
        name, files = wanted
        staged = self._staging.new_path()
        picture = Path(self._layout.picture_file(task)).relative_to(name)
        (staged / picture.parent).mkdir(parents=True)
        for file_name, text in files.items():
            (staged / file_name).write_text(text, encoding="utf-8", newline="")
        try:
            os.rename(staged, self.path / name)
        except OSError:
            if not (self.path / name).exists():
                raise
            shutil.rmtree(staged)  # another process was faster


def load_records(folder: Path) -> dict[str, dict]:
    """The records of a run's folder, finished or not, by request id."""
    paths = (folder / RECORDS, *_list_parts(folder))
    return {str(record.get("request")): record for path in paths for record in load_lines(path)}


def _list_parts(folder: Path) -> list[Path]:
    return sorted((folder / HIDDEN / "records").glob("*.jsonl"))


def load_run(folder: Path) -> dict[str, Any]:
    """The content of a run's `run.json`. Raises UsageError where there is none that realign wrote."""
    try:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder}: has no run.json that can be read; name another folder") from error
    if not (
        isinstance(run, dict) and run.get("made_by") == "realign" and isinstance(run.get("settings"), dict)
    ):
        raise UsageError(f"{folder}: its run.json is not realign's; name another folder")
    return run


def check_empty(path: Path, allowed: Sequence[str] = ()) -> None:
    """Raises UsageError where an existing folder has entries other than those allowed, and no run."""
    strange = sorted(entry.name for entry in path.iterdir() if entry.name not in (HIDDEN, *allowed))
    # Looked for last: another process of this launch may just have made it.
    if strange and not (path / "run.json").exists():
        what = f"has files that realign did not make ({strange[0]!r})"
        raise UsageError(f"--out {path}: {what}; name a new or empty folder")


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
