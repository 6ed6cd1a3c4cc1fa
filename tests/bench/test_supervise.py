"""A kernel that kills or hangs its process costs its own rows, and no others."""

from __future__ import annotations

import time
from functools import partial

import pytest

from bench import supervise
from bench.case import Shape
from bench.measure import Task
from bench.supervise import Worker, leave_out, work_off
from tests.bench.fakes import BrokenTimer, WallTimer, measure_in_no_time

SHAPE = Shape({"L": 5})
start = partial(Worker, WallTimer, measure_in_no_time)


def work(*ops: str, seconds: float = 60.0, starts=start):
    """What was reported, what failed, and what was not reached."""
    reported = []
    problems, missed = work_off(
        [Task(op, SHAPE) for op in ops],
        starts,
        time.monotonic() + seconds,
        lambda task, measured: reported.append((task.op, list(measured.timings))),
    )
    return reported, problems, [task.op for task in missed]


def test_tasks_are_done_in_their_order_by_one_process():
    starts = []

    def count_starts():
        starts.append(1)
        return start()

    reported, problems, missed = work("b", "a", starts=count_starts)
    assert reported == [("b", ["torch", "triton", "b"]), ("a", ["torch", "triton", "a"])]
    assert (problems, missed, starts) == ([], [], [1])


def test_a_run_that_ends_its_process_is_left_out():
    reported, problems, missed = work("dies", "a", "dies")
    assert reported == [
        ("dies", ["torch", "triton"]),
        ("a", ["torch", "triton", "a"]),
        ("dies", ["torch", "triton"]),
    ]
    assert problems == ["dies L5 float32: the process ended with code 3 in dies"]
    assert missed == []


def test_a_run_that_never_returns_is_left_out(monkeypatch):
    monkeypatch.setattr(supervise, "STEP_SECONDS", 2.0)
    reported, problems, missed = work("a", "hangs")
    assert reported == [("a", ["torch", "triton", "a"]), ("hangs", ["torch", "triton"])]
    assert problems == ["hangs L5 float32: hangs did not return within 2 s"]
    assert missed == []


def test_wrong_numbers_cost_one_case():
    reported, problems, _ = work("wrong", "a")
    assert [op for op, _ in reported] == ["a"]
    assert problems == ["wrong L5 float32: triton differs from plain torch by nan, allowed are 1.0e-05"]


def test_the_deadline_ends_a_task_and_keeps_what_was_done():
    worker = start()
    worker.ask(
        Task("a", SHAPE), time.monotonic() + 60
    )  # it has started: that may take longer than this test allows
    begin = time.monotonic()
    reported, problems, missed = work("a", "hangs", "b", seconds=5.0, starts=lambda: worker)
    assert 5 <= time.monotonic() - begin < 15
    assert reported == [("a", ["torch", "triton", "a"])]
    assert (problems, missed) == ([], ["hangs", "b"])


def test_without_time_nothing_starts():
    assert work("a", seconds=0.0, starts=None) == ([], [], ["a"])


def test_a_process_that_cannot_start_ends_it():
    reported, problems, missed = work("a", "b", starts=partial(Worker, BrokenTimer, measure_in_no_time))
    assert reported == []
    assert problems == ["a L5 float32: the process ended with code 1 in start"]
    assert missed == ["b"]


@pytest.mark.parametrize("step", ["build", "torch"])
def test_without_inputs_or_plain_torch_an_op_is_given_up(step):
    waiting = [Task("a", SHAPE), Task("b", SHAPE)]
    assert leave_out(step, Task("a", SHAPE), waiting) == [Task("b", SHAPE)]
