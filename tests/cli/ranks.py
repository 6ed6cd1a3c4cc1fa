"""Start the command as several processes that share a run, by fork: quick, and the tests' stand-ins hold."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from realign.cli.__main__ import main
from tests.cli.quick import QuickEngine, die_at

PATIENCE = 300.0  # on a busy machine the imports alone take long


@dataclass(frozen=True)
class Ended:
    """What a process did; `code` is negative for a signal."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Rank:
    """A process that was started, and the files that hold what it says."""

    pid: int
    folder: Path

    def wait(self) -> Ended:
        status = os.waitpid(self.pid, 0)[1]
        texts = [(self.folder / name).read_text(encoding="utf-8") for name in ("out", "err")]
        return Ended(os.waitstatus_to_exitcode(status), *texts)

    def kill(self) -> Ended:
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()


@dataclass(frozen=True)
class Launch:
    """Starts processes of one launch on one command.

    Attributes:
        folder: for what they say.
        arguments: of the command line.
        world_size: how many they are.
        port: tells launches apart, as the launcher's own port does.
    """

    folder: Path
    arguments: Sequence[object]
    world_size: int
    port: int = 29500

    def start(self, rank: int, kill_at: int | None = None) -> Rank:
        """One process; `kill_at` is the write at which it is killed."""
        folder = self.folder / f"port-{self.port}-rank-{rank}-{time.monotonic_ns()}"
        folder.mkdir(parents=True)
        for name in ("out", "err"):
            (folder / name).touch()
        pid = os.fork()
        if pid == 0:
            self._run(rank, folder, kill_at)
        return Rank(pid, folder)

    def run(self, kill_at: Iterable[int | None] | None = None) -> list[Ended]:
        """All processes, to their ends."""
        moments = [None] * self.world_size if kill_at is None else list(kill_at)
        ranks = [self.start(rank, moment) for rank, moment in enumerate(moments)]
        return [rank.wait() for rank in ranks]

    def _run(self, rank: int, folder: Path, kill_at: int | None) -> None:
        code = 70
        try:
            sys.stdout, sys.stderr = ((folder / name).open("w", encoding="utf-8") for name in ("out", "err"))
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(self.world_size))
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(self.port))
            if kill_at is not None:
                die_at(kill_at)
            code = main([str(argument) for argument in self.arguments])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


class MeetingEngine(QuickEngine):
    """At its first request each process waits until `count` of them are there; notes what each is given."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder, self._count = folder, count

    def stream(self, requests: Iterable, options: object) -> Iterator[SimpleNamespace]:
        self._folder.mkdir(exist_ok=True)
        for sample in super().stream(requests, options):
            with (self._folder / os.environ["RANK"]).open("a", encoding="utf-8") as file:
                file.write(f"{sample.request.id}\n")
            wait_until(lambda: len(list(self._folder.iterdir())) >= self._count)
            time.sleep(0.01)
            yield sample

    @staticmethod
    def read(folder: Path) -> dict[str, list[str]]:
        """By rank, the requests it was given."""
        return {path.name: path.read_text(encoding="utf-8").split() for path in folder.iterdir()}
