"""Saves pictures in a thread while the next are made: packing a PNG and waiting for the disk take time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")

# Items that wait to be saved at most.
DEPTH = 32


class Writer(Generic[Item]):
    """Calls `save` for each item, in order, in a thread of its own; a context manager.

    The first error ends the saving, and is raised by the next call here, or at the end. What was put is saved
    even if the work that it came of is interrupted.
    """

    def __init__(self, save: Callable[[Item], object]) -> None:
        self._save = save
        self._has_failed = False
        self._waiting: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, "realign-writer")

    def __enter__(self) -> Writer[Item]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self.flush()

    def put(self, item: Item) -> None:
        """Let the item be saved soon; waits where many wait already."""
        while len(self._waiting) >= DEPTH or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(self._try, item))

    def flush(self) -> None:
        """Wait until all is saved."""
        while self._waiting:
            self._waiting.popleft().result()

    def _try(self, item: Item) -> None:
        if self._has_failed:
            return
        self._has_failed = True  # unless it comes back
        self._save(item)
        self._has_failed = False
