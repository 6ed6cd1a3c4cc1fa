"""A process's share of a run: the batches it takes, one by one, and when each of them is done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import Lock

from realign.cli.console import Progress
from realign.cli.folder import RunFolder
from realign.cli.layout import Task


class Share:
    """Deals out tasks and counts what is done, by whomever. Its methods may be called from any thread.

    Args:
        batches: of the whole run; a batch is one process's.
        progress: is told what is done.
    """

    def __init__(self, folder: RunFolder, batches: Sequence[Sequence[Task]], progress: Progress) -> None:
        self._folder, self._batches, self._progress = folder, batches, progress
        self._lock = Lock()
        self._batch_of: dict[str, int] = {}  # of each request that is to be saved
        self._left: dict[int, int] = {}  # requests of each batch taken that are to be saved
        self._counted: set[int] = set()

    def take(self) -> Iterator[Task]:
        """Pictures that are this process's to make; ends where there are none to take, for now."""
        while (number := self._take_batch()) is not None:
            batch = self._batches[number]
            missing = [task for task in batch if not self._folder.has_picture(task)]
            with self._lock:
                self._progress.advance(len(batch) - len(missing))
                self._batch_of.update({task.request_id: number for task in missing})
                self._left[number] = len(missing)
                if not missing:
                    self._finish(number)
            yield from missing

    def save(self, task: Task) -> None:
        """The task's picture is in place."""
        with self._lock:
            self._progress.advance()
            number = self._batch_of.pop(task.request_id)
            self._left[number] -= 1
            if not self._left[number]:
                self._finish(number)

    def is_complete(self) -> bool:
        """Whether all batches are done; counts those of other processes."""
        with self._lock:
            others = self._folder.claims.done(len(self._batches)) - self._counted
            self._progress.advance(sum(len(self._batches[other]) for other in others))
            self._counted |= others
            return len(self._counted) == len(self._batches)

    def _take_batch(self) -> int | None:
        with self._lock:
            return self._folder.claims.take(len(self._batches))

    def _finish(self, number: int) -> None:
        self._folder.claims.finish(number)
        self._counted.add(number)
        del self._left[number]
