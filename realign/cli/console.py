"""What a command says on standard error: one-line errors and warnings, and the progress of a run.

Of several processes the first alone says notes, warnings and progress.
"""

from __future__ import annotations

import sys
import time
from typing import Protocol

from realign.cli.processes import current_process

HEAD_START_SECONDS = 5.0


class UsageError(ValueError):
    """The command cannot be carried out as asked; the text is one line with what to change. Exit code 2."""


class OwnUsageError(UsageError):
    """One that concerns this process alone, of several: it says so itself."""


class RunError(RuntimeError):
    """A run cannot go on from here, through no fault of the program; the text is one line. Exit code 1."""


def print_error(message: object) -> None:
    _print_line(f"realign: error: {message}")


def print_refusal(error: object) -> None:
    """Print why a command is refused: once a machine, as its other processes refuse the same.

    Those wait a little before they end, because launchers end all processes as soon as one has ended.
    """
    if current_process().is_first_here or isinstance(error, OwnUsageError):
        print_error(error)
    else:
        time.sleep(HEAD_START_SECONDS)


def print_warning(message: object) -> None:
    if current_process().is_first:
        _print_line(f"realign: warning: {message}")


def print_note(message: object) -> None:
    if current_process().is_first:
        _print_line(f"realign: {message}")


def print_own_note(message: object) -> None:
    """One that each of several processes has of its own."""
    _print_line(f"realign: {message}")


def _print_line(text: str) -> None:
    """Print one line, whatever a file name or a library's message has in it."""
    print(" ".join(text.split()), file=sys.stderr, flush=True)


class Progress(Protocol):
    """Counts finished pictures; a context manager."""

    def __enter__(self) -> Progress: ...

    def __exit__(self, *error: object) -> None: ...

    def advance(self, count: int = 1) -> None: ...


def build_progress(total: int, done: int, doing: str = "generating") -> Progress:
    """A bar on a terminal, else a plain line now and then; `done` of `total` pictures were there before."""
    if not current_process().is_first:
        return NoProgress()
    return BarProgress(total, done, doing) if sys.stderr.isatty() else LineProgress(total, done)


class NoProgress:
    """Says nothing."""

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def advance(self, count: int = 1) -> None:
        return None


class BarProgress:
    """A bar with the count, pictures per second and the time left."""

    def __init__(self, total: int, done: int, doing: str = "generating") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn(doing),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        self._bar = RichProgress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(doing, total=total, completed=done, rate="")
        self._meter = RateMeter(total, done)

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        self._meter.advance(count)
        self._bar.update(self._task, advance=count, rate=self._meter.describe())


class LineProgress:
    """A plain line at most every `interval` seconds, and one at the end: for logs."""

    def __init__(self, total: int, done: int, interval: float = 10.0) -> None:
        self._meter = RateMeter(total, done)
        self._interval = interval
        self._last = time.monotonic()

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def advance(self, count: int = 1) -> None:
        if not count:
            return
        self._meter.advance(count)
        now = time.monotonic()
        if self._meter.done == self._meter.total or now - self._last >= self._interval:
            self._last = now
            print_note(f"{self._meter.done}/{self._meter.total} pictures, {self._meter.describe()}")


class RateMeter:
    """Pictures per second since this process began, and from it the time left."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self._first = done
        self._start = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self.done += count

    def describe(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._first) / seconds
        if rate == 0.0:
            return "0 images/s"
        if self.done >= self.total:
            return f"{rate:.3g} images/s, {format_duration(seconds)} in all"
        return f"{rate:.3g} images/s, {format_duration((self.total - self.done) / rate)} left"


def format_duration(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
