"""Where the pictures of a run lie in its folder: realign's own layout, or GenEval's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from realign.data.readers import PromptEntry


@dataclass(frozen=True)
class Task:
    """One picture to make: number `index` of a prompt."""

    entry: PromptEntry
    index: int

    @property
    def request_id(self) -> str:
        """Names the request; its noise is keyed on it. The same for any --num-images."""
        return f"{self.entry.id}/{self.index}"


class Layout(Protocol):
    """Names the files of a run, relative to its folder, with '/'."""

    def picture_file(self, task: Task) -> str: ...

    def prompt_folder(self, task: Task) -> tuple[str, dict[str, str]] | None:
        """A folder that must stand whole before the picture: its name, and its text files by name."""


@dataclass(frozen=True)
class NativeLayout:
    """`images/ID.png`, or with several pictures a prompt `images/ID_0.png`, `images/ID_1.png`, ..."""

    num_images: int

    def picture_file(self, task: Task) -> str:
        if self.num_images == 1:
            return f"images/{task.entry.id}.png"
        return f"images/{task.entry.id}_{task.index:0{len(str(self.num_images - 1))}d}.png"

    def prompt_folder(self, task: Task) -> None:
        return None


@dataclass(frozen=True)
class GenEvalLayout:
    """GenEval's (djghosh13/geneval, README): `00000/metadata.jsonl` and `00000/samples/00000.png`, ...

    Its scorer reads every folder whose name is all digits, and in `samples` every file that begins like a
    numbered PNG; all else in the run folder has other names.
    """

    def picture_file(self, task: Task) -> str:
        return f"{task.entry.id}/samples/{task.index:05d}.png"

    def prompt_folder(self, task: Task) -> tuple[str, dict[str, str]]:
        return task.entry.id, {"metadata.jsonl": task.entry.source}


def build_layout(format: str, num_images: int) -> Layout:
    return GenEvalLayout() if format == "geneval" else NativeLayout(num_images)
