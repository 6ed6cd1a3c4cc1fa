"""What a run writes of itself as it goes: rows in JSONL files, and the same numbers for TensorBoard.

Rows and events after the checkpoint from which a run goes on are taken back, so nothing is there twice.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from train.state import append_row, drop_rows_after

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG, EVALUATIONS, EVENTS = "log.jsonl", "evaluations.jsonl", "tensorboard"


class Journal:
    """The rows and events of a run in a folder; to be closed.

    Args:
        out: the run's folder; made if it is not there.
        step: the iterations that are kept of an earlier part of the run.
    """

    def __init__(self, out: Path, step: int) -> None:
        self.log, self.evaluations = out / LOG, out / EVALUATIONS
        out.mkdir(parents=True, exist_ok=True)
        for path in (self.log, self.evaluations):
            drop_rows_after(path, step)
        self.is_new = not (out / EVENTS).exists()
        self.events = _open_events(out / EVENTS, step)

    def close(self) -> None:
        if self.events is not None:
            self.events.close()

    def add_recipe(self, recipe: Mapping[str, Any]) -> None:
        """For TensorBoard's text page, once."""
        if self.events is not None and self.is_new:
            said = json.dumps(recipe, indent=2, ensure_ascii=False)
            self.events.add_text("recipe", "".join(f"    {line}\n" for line in said.splitlines()), 0)

    def add_row(self, row: Mapping[str, Any]) -> None:
        """An iteration's."""
        append_row(self.log, row)
        self._add_events(row, "train")

    def add_evaluation(self, row: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> None:
        """An evaluation's, with sample pictures by name."""
        append_row(self.evaluations, row)
        if self.events is not None:
            for name, picture in pictures.items():
                tag = f"evaluation/{name}"
                self.events.add_image(tag, np.asarray(picture), row["step"], dataformats="HWC")
        self._add_events(row, "evaluation")

    def has_evaluation(self, step: int) -> bool:
        return any(row["step"] == step for row in load_rows(self.evaluations))

    def _add_events(self, row: Mapping[str, Any], group: str) -> None:
        """On disk when this returns: a checkpoint that comes after them says that they are there."""
        if self.events is None:
            return
        for tag, value in name_numbers(row, group):
            self.events.add_scalar(tag, value, row["step"])
        self.events.flush()


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log that may not be there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def name_numbers(row: Mapping[str, Any], group: str) -> Iterator[tuple[str, float]]:
    """The numbers of a row as TensorBoard names them: `train/reward`, `train_seconds/rollout`."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from name_numbers(value, f"{group}_{name}")
        elif name != "step":
            yield f"{group}/{name}", value


def _open_events(folder: Path, step: int) -> SummaryWriter | None:
    """Later steps of an earlier part of the run are hidden from TensorBoard. Without the package: None."""
    if find_spec("tensorboard") is None:
        said = "no events for TensorBoard, as tensorboard is not installed; the numbers are in log.jsonl"
        print(said, file=sys.stderr, flush=True)
        return None
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # where TensorFlow is installed, it is imported too
    from torch.utils.tensorboard import SummaryWriter

    is_resumed = folder.is_dir() and any(folder.iterdir())
    return SummaryWriter(str(folder), purge_step=step + 1 if is_resumed else None)
