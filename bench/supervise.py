"""Keeps a process that measures: when it dies or hangs, its task is blamed and a new one goes on.

A wrong kernel can take its process's CUDA context with it, or never return; the rows of all other ops must
not depend on it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from bench.case import PLAIN
from bench.measure import Compiled, Measured, Task, Timer

START_SECONDS = 120.0
STEP_SECONDS = 60.0  # after that a step is taken for hung; the longest is a cold compilation

Answer = Measured | Compiled
Perform = Callable[[Task, Timer, Callable[[str], None]], Answer]


@dataclass(frozen=True)
class Refused:
    """The case has no row: a run of ours gives wrong numbers."""

    reason: str


@dataclass(frozen=True)
class Died:
    """The process ended, or was ended, in this step."""

    step: str
    reason: str


class TimeIsUp(Exception):
    """The deadline came in the middle of a task."""


def serve(connection: Connection, make_timer: Callable[[], Timer], perform: Perform) -> None:
    """The process that measures: answers tasks for ever, telling each step before it is taken."""
    timer = make_timer()
    with timer.scope():
        while True:
            task = connection.recv()
            try:
                connection.send(perform(task, timer, connection.send))
            except ValueError as error:
                connection.send(Refused(str(error)))


class Worker:
    """A process that runs `serve`."""

    def __init__(self, make_timer: Callable[[], Timer], perform: Perform) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make_timer, perform), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, task: Task, deadline: float) -> Answer | Refused | Died:
        """Have a task done; a worker that died is of no further use. Raises TimeIsUp at the deadline."""
        with contextlib.suppress(ConnectionError):  # it has ended; receiving says how
            self.connection.send(task)
        step: object = "start"
        while isinstance(step, str):
            limit = START_SECONDS if step == "start" else STEP_SECONDS
            last, step = step, self._receive(step, min(limit, deadline - time.monotonic()))
            if isinstance(step, Died) and time.monotonic() >= deadline:
                raise TimeIsUp(last)
        return step

    def _receive(self, step: str, seconds: float) -> Answer | Refused | Died | str:
        """What the process says next; Died if it says nothing in that time."""
        try:
            if self.connection.poll(max(seconds, 0)):
                return self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            return Died(step, f"the process ended with code {self.process.exitcode} in {step}")
        self.stop()
        return Died(step, f"{step} did not return within {seconds:.0f} s")

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def work_off(
    tasks: list[Task],
    start: Callable[[], Worker],
    deadline: float,
    report: Callable[[Task, Answer], None],
) -> tuple[list[str], list[Task]]:
    """Have tasks done in their order until the deadline (of time.monotonic).

    A run that ends its process is left out from then on; if plain torch or the building does, its op is.

    Returns: a line on everything that failed, and the tasks not done for want of time.
    """
    waiting, problems, worker = deque(tasks), [], None
    try:
        while waiting and time.monotonic() < deadline:
            worker = worker or start()
            answer = worker.ask(waiting[0], deadline)
            task = waiting.popleft()
            if isinstance(answer, Answer):
                report(task, answer)
                continue
            problems.append(f"{task}: {answer.reason}")
            if isinstance(answer, Died):
                worker = None
                if answer.step == "start":
                    break
                waiting = deque(leave_out(answer.step, task, waiting))
    except TimeIsUp:
        pass
    finally:
        if worker is not None:
            worker.stop()
    return problems, list(waiting)


def leave_out(step: str, task: Task, waiting: deque[Task]) -> list[Task]:
    """The tasks left when `step` of `task` has ended its process: the task again, first, without it."""
    if step in ("build", PLAIN):
        return [other for other in waiting if other.op != task.op]
    return [
        replace(other, without=other.without | {step}) if other.op == task.op else other
        for other in (task, *waiting)
    ]
