"""Which batches of a run are whose: its processes take them one by one, and a dead one's are free again.

`.realign/claims` has a byte for each batch, 1 once it is done; a lock on that byte is the claim. POSIX locks
of byte ranges hold from machine to machine on network file systems too, and the system takes them back when
the process ends, in whatever way. A dead process's pictures are found in the folder by who takes its batch.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from realign.cli.locks import NO_LOCKS_HERE, no_locks

POLL_SECONDS = 0.1
_DOOR = 0  # the byte whose lock is the door, and which is 1 once the run is complete
_FIRST_BATCH = 1


class Claims(Protocol):
    """Deals out the numbers of batches, from 0."""

    def opened(self) -> AbstractContextManager[None]:
        """Within it all else may be called."""

    def door(self) -> AbstractContextManager[None]:
        """Within it no other process is, while it prepares the folder, joins a run, or completes it."""

    def reset(self) -> None:
        """No batch is done."""

    def take(self, count: int) -> int | None:
        """One of `count` batches that is neither done nor taken; None where there is none, for now."""

    def finish(self, number: int) -> None:
        """A batch that was taken is done."""

    def done(self, count: int) -> set[int]:
        """Those that are done, by whomever."""

    def is_complete(self) -> bool: ...

    def complete(self) -> None:
        """All is done and brought together."""


class OwnClaims:
    """Those of a process that is alone: in memory."""

    def __init__(self) -> None:
        self._done: set[int] = set()
        self._taken: set[int] = set()

    def opened(self) -> AbstractContextManager[None]:
        return nullcontext()

    def door(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reset(self) -> None:
        self._done.clear()
        self._taken.clear()

    def take(self, count: int) -> int | None:
        number = next((number for number in range(count) if number not in self._taken), None)
        if number is not None:
            self._taken.add(number)
        return number

    def finish(self, number: int) -> None:
        self._done.add(number)

    def done(self, count: int) -> set[int]:
        return self._done

    def is_complete(self) -> bool:
        return False

    def complete(self) -> None:
        return None


class SharedClaims:
    """Those of several processes: bytes of a file.

    Args:
        folder: the run's folder, for messages.
        path: the file; made if it is not there, and left for the next run. No other code of the process may
            open it: its locks would be lost when that closes it.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder, self._path, self._file = folder, path, -1
        self._taken: set[int] = set()  # a process is not kept out by its own locks

    @contextmanager
    def opened(self) -> Iterator[None]:
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield
        finally:
            os.close(self._file)

    @contextmanager
    def door(self) -> Iterator[None]:
        while not self._lock(_DOOR):
            time.sleep(POLL_SECONDS)
        try:
            yield
        finally:
            self._unlock(_DOOR)

    def reset(self) -> None:
        os.ftruncate(self._file, 0)

    def take(self, count: int) -> int | None:
        passed = self.done(count) | self._taken
        for number in range(count):
            if number not in passed and self._lock(_FIRST_BATCH + number):
                if not self._read(_FIRST_BATCH + number):
                    self._taken.add(number)
                    return number
                self._unlock(_FIRST_BATCH + number)
        return None

    def finish(self, number: int) -> None:
        os.pwrite(self._file, b"\1", _FIRST_BATCH + number)
        self._taken.discard(number)
        self._unlock(_FIRST_BATCH + number)

    def done(self, count: int) -> set[int]:
        states = os.pread(self._file, count, _FIRST_BATCH)
        return {number for number, state in enumerate(states) if state}

    def is_complete(self) -> bool:
        return self._read(_DOOR)

    def complete(self) -> None:
        os.pwrite(self._file, b"\1", _DOOR)

    def _read(self, place: int) -> bool:
        return os.pread(self._file, 1, place) == b"\1"

    def _lock(self, place: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):  # the system may answer either where another holds it
            return False
        except OSError as error:
            if error.errno in NO_LOCKS_HERE:
                raise no_locks(self._folder) from error
            raise
        return True

    def _unlock(self, place: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)
