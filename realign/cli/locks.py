"""Who may write in a run's folder: one process alone, or together the processes of one launch.

The lock is `flock` on `.realign/lock`: exclusive for a process alone, shared among several. The system takes
it back when a process ends, in whatever way, so nothing stale is ever in the way.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from realign.cli.console import UsageError, print_warning
from realign.cli.processes import Process

NO_LOCKS_HERE = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)


class FolderLock:
    """The lock of one folder.

    Args:
        folder: the run's folder, for messages.
        path: the file that is locked; its folder exists when `hold` is called.
        process: this process.
    """

    def __init__(self, folder: Path, path: Path, process: Process) -> None:
        self._folder, self._path, self._process = folder, path, process

    def check(self) -> None:
        """Look whether `hold` would work now. Several processes only see it there. Raises UsageError."""
        if self._process.is_alone and self._path.exists():
            with self._path.open("r+") as file:
                self._take(file)

    @contextmanager
    def hold(self) -> Iterator[bool]:
        """Hold the lock; gives whether no other process of this launch held it, so that all is to prepare.

        Processes of one launch must not call it at once: they come through a door (see `claims`).
        Raises UsageError where another run's process holds it.
        """
        with self._path.open("a+") as file:
            is_first = self._take(file)
            if is_first:
                file.truncate(0)
                file.write(f"{os.getpid()} {self._process.job}".strip() + "\n")
                file.flush()
                os.fsync(file.fileno())
                if not (self._process.is_alone or self._try(file, fcntl.LOCK_SH)):
                    raise self._refusal(file)
            yield is_first

    def _take(self, file: IO[str]) -> bool:
        if self._try(file, fcntl.LOCK_EX):
            return True
        if self._process.is_alone or self._read(file)[1] != self._process.job:
            raise self._refusal(file)
        if not self._try(file, fcntl.LOCK_SH):
            raise self._refusal(file)
        return False

    def _try(self, file: IO[str], kind: int) -> bool:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in NO_LOCKS_HERE:
                raise
            if not self._process.is_alone:
                raise no_locks(self._folder) from error
            print_warning(f"{self._folder} is on a disk without locks: do not start a second run there")
        return True

    def _read(self, file: IO[str]) -> tuple[str, str]:
        """The process id and the launch of the one who wrote last."""
        file.seek(0)
        holder, _, job = file.read().strip().partition(" ")
        return holder or "unknown", job

    def _refusal(self, file: IO[str]) -> UsageError:
        what = f"another realign process (pid {self._read(file)[0]}) is writing here"
        return UsageError(f"--out {self._folder}: {what}; wait for it or name another folder")


def no_locks(folder: Path) -> UsageError:
    return UsageError(
        f"--out {folder}: is on a disk without locks, where one process works alone; "
        "start one, or name a folder on another disk"
    )
