"""The work of a run: the pictures still to make, each saved as it comes.

Of several processes each takes a batch when it needs one, so that a slow one takes fewer, and what a dead one
had is taken by another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realign.cli.claims import POLL_SECONDS
from realign.cli.console import RunError, build_progress
from realign.cli.folder import RunFolder
from realign.cli.layout import Task
from realign.cli.options import PictureOptions
from realign.cli.processes import Process
from realign.cli.share import Share
from realign.cli.writer import Writer
from realign.data.images import Picture, load_picture
from realign.data.readers import PictureEntry, PromptFile, Reference, TextEntry

if TYPE_CHECKING:
    from realign.runtime.engine import Engine
    from realign.runtime.request import Reasoning, Request, Sample
    from realign.runtime.settings import Settings
    from realign.runtime.stream import StreamOptions

# Decoded reference pictures kept for the prompts that follow; one may have 120 MB.
REFERENCES_KEPT = 16
# A batch as full as this, of its size, is left so rather than part the pictures of a prompt.
FULL_ENOUGH = 0.75


def build_tasks(prompts: PromptFile, num_images: int) -> list[Task]:
    return [Task(entry, index) for entry in prompts.entries for index in range(num_images)]


def cut_batches(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """Batches of at most `size`, in order; the pictures of a prompt, which share its context, stay together
    where that leaves no batch much emptier.
    """
    batches: list[list[Task]] = [[]]
    for _, group in groupby(tasks, key=lambda task: task.entry.id):
        rest = list(group)
        if len(batches[-1]) + len(rest) > size and len(batches[-1]) >= FULL_ENOUGH * size:
            batches.append([])
        while rest:
            room = size - len(batches[-1])
            batches[-1] += rest[:room]
            rest = rest[room:]
            if rest:
                batches.append([])
    return [batch for batch in batches if batch]


def bound_stream(batch_size: int | None, share: int, process: Process) -> StreamOptions:
    """What an engine may take at a time: of several processes none so much that others have nothing to do."""
    from realign.runtime.stream import StreamOptions

    options = StreamOptions(batch_size=batch_size)
    if process.is_alone:
        return options
    window = min(options.window, ceil(share / 2))
    return replace(options, window=window, ahead=min(options.ahead, share - window))


@dataclass(frozen=True)
class Job:
    """Everything the batches need: prompts and reference pictures as checked, what decides the pictures, and
    where they go.
    """

    prompts: PromptFile
    references: Mapping[Path, Reference]
    options: PictureOptions
    folder: RunFolder

    def run(
        self,
        batches: Sequence[Sequence[Task]],
        num_done: int,
        engine: Engine,
        options: StreamOptions,
    ) -> None:
        """Make this process's share of the pictures, and see that all are made; `num_done` others were there
        before.
        """
        from realign.api import build_settings

        settings = build_settings(**self.options.of_request())
        tasks = {task.request_id: task for batch in batches for task in batch}
        with build_progress(sum(map(len, batches)) + num_done, num_done) as progress:
            share = Share(self.folder, batches, progress)

            def save(sample: Sample) -> None:
                task = tasks[sample.request.id]
                self.folder.save_picture(task, sample.image, self._record(task, sample))
                share.save(task)

            with Writer(save) as writer:
                while not share.is_complete():
                    requests = self._build_requests(share.take(), settings)
                    with shortage_is_said():
                        for sample in engine.stream(requests, options):
                            writer.put(sample)
                    writer.flush()
                    if not share.is_complete():
                        time.sleep(POLL_SECONDS)  # what a dead process had is free soon

    def _build_requests(self, tasks: Iterable[Task], settings: Settings) -> Iterator[Request]:
        load = lru_cache(maxsize=REFERENCES_KEPT)(self._load_reference)
        for task in tasks:
            yield build_request(task, self.seed_of(task), settings, load)

    def seed_of(self, task: Task) -> int:
        return self.options.seed if task.entry.seed is None else task.entry.seed

    def _load_reference(self, path: Path) -> Picture:
        try:
            picture = load_picture(path)
        except ValueError as error:
            raise RunError(error) from error
        if picture.sha256 != self.references[path].sha256:
            raise RunError(f"picture {str(path)!r} was changed while the run was going on")
        return picture

    def _record(self, task: Task, sample: Sample) -> dict[str, Any]:
        parts, images = [], iter(sample.request.prompt.pictures)
        for part in task.entry.parts:
            if isinstance(part, TextEntry):
                parts.append({"text": part.text})
            else:
                image = next(images)
                name = self.folder.save_reference(self.references[part.path].sha256, image)
                width, height = image.size
                parts.append({"image": name, "source": part.name, "height": height, "width": width})
        return {
            "id": task.entry.id,
            "index": task.index,
            "seed": self.seed_of(task),
            "height": sample.image.height,
            "width": sample.image.width,
            "prompt": parts,
            "reasoning": _describe_reasoning(sample.reasoning),
        }


def build_request(task: Task, seed: int, settings: Settings, load: Callable[[Path], Picture]) -> Request:
    from realign.runtime.request import ImagePart, Prompt, Request, TextPart

    parts = [
        ImagePart(load(part.path).image) if isinstance(part, PictureEntry) else TextPart(part.text)
        for part in task.entry.parts
    ]
    return Request(id=task.request_id, prompt=Prompt(tuple(parts)), seed=seed, settings=settings)


@contextmanager
def shortage_is_said() -> Iterator[None]:
    """Raises RunError where memory does not hold even one picture."""
    from realign.runtime.budget import MemoryShortage

    try:
        yield
    except MemoryShortage as error:
        raise RunError(error) from error


def _describe_reasoning(reasoning: Reasoning | None) -> dict[str, Any] | None:
    if reasoning is None:
        return None
    return {
        "mode": reasoning.mode,
        "text": reasoning.text,
        "caption": reasoning.caption,
        "relations": list(reasoning.relations),
        "error": reasoning.error,
    }
