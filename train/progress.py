"""How far a run is: a bar on a terminal, else a plain line an iteration."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from realign.cli.console import format_duration

RECENT = 20  # iterations whose mean time tells when a run ends


class Progress:
    """Says what an iteration was like, and how long the rest will take; a context manager.

    Args:
        total, done: iterations of the run, and those done before.
        is_shown: whether this process says it.
    """

    def __init__(self, total: int, done: int, is_shown: bool) -> None:
        self.total, self.is_shown = total, is_shown
        self.has_bar = is_shown and sys.stdout.isatty()
        self.seconds: deque[float] = deque(maxlen=RECENT)
        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = Bar(*columns, disable=not self.has_bar)
        self.task = self.bar.add_task("aligning", total=total, completed=done)
        self.begin()

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def begin(self) -> None:
        """Iterations are timed from here."""
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, row: Mapping[str, Any]) -> None:
        """An iteration is done; `row` is its row of the log."""
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.began = now
        if not self.is_shown:
            return
        if self.has_bar:
            self.bar.update(self.task, completed=row["step"], description=self._describe(row))
        else:
            self.say(f"{row['step']}/{self.total}  {self._describe(row)}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.has_bar:
            self.bar.console.print(text, markup=False, highlight=False)
        elif self.is_shown:
            print(text, flush=True)

    def _describe(self, row: Mapping[str, Any]) -> str:
        mean = sum(self.seconds) / len(self.seconds)  # evaluations and checkpoints included
        left = format_duration(mean * (self.total - row["step"]))
        numbers = f"reward {row['reward']:.4f}  spread {row['spread']:.4f}"
        pace = f"{sum(row['seconds'].values()):.3g} s/it  {row['images_per_second']:.3g} images/s"
        return f"{numbers}  {pace}  {left} left"
