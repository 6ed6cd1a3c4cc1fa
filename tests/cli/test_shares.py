"""Who a process is among several, which device it has, and how the work is cut for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realign.cli.console import OwnUsageError, UsageError
from realign.cli.generate import resolve_device
from realign.cli.job import bound_stream, cut_batches
from realign.cli.layout import Task
from realign.cli.processes import ALONE, Process, current_process
from realign.data.readers import PromptEntry, TextEntry
from tests.cli.support import Workplace


@pytest.mark.parametrize(
    ("environment", "process"),
    [
        ({}, ALONE),
        ({"RANK": "2"}, ALONE),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        ({"RANK": "1", "WORLD_SIZE": "3"}, Process(1, 3, 1, 3, "|||3")),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Process(5, 8, 1, None, "|||8")),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n0",
             "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "r"},
            Process(5, 8, 1, 4, "r|n0|29500|8"),
        ),
    ],
)  # fmt: skip
def test_the_environment_says_who_this_is(environment: dict[str, str], process: Process) -> None:
    assert current_process(environment) == process


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [("3", "3", "RANK is 3 and WORLD_SIZE 3"), ("-1", "3", "RANK is '-1'"), ("0", "many", "WORLD_SIZE is")],
)
def test_numbers_that_cannot_be_are_refused(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str, message: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    outcome = place.run("generate", "x.txt", "--out", place.out)
    assert outcome.code == 2
    assert outcome.err.startswith(f"realign: error: {message}")
    assert outcome.err.count("\n") == 1


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def test_each_has_the_device_of_its_number(four_devices: None) -> None:
    first, last = (Process(rank, 8, rank % 4, 4) for rank in (0, 7))
    for device in ("auto", "cuda"):
        assert resolve_device(device, "auto") == ("cuda", "bfloat16")
        assert resolve_device(device, "auto", first) == ("cuda:0", "bfloat16")
        assert resolve_device(device, "auto", last) == ("cuda:3", "bfloat16")
    assert resolve_device("cuda:2", "auto", last) == ("cuda:2", "bfloat16")
    assert resolve_device("cpu", "auto", last) == ("cpu", "float32")


def test_more_processes_than_devices_are_refused(four_devices: None) -> None:
    for rank in range(5):  # each of them, so that none begins
        with pytest.raises(UsageError, match=r"--device auto: for 5 processes torch finds 4 CUDA devices"):
            resolve_device("auto", "auto", Process(rank, 5, rank, 5))
    unsaid = [Process(rank, 5, rank, None) for rank in range(5)]
    assert resolve_device("cuda", "auto", unsaid[3])[0] == "cuda:3"
    with pytest.raises(OwnUsageError, match="for LOCAL_RANK 4 torch finds 4 CUDA devices here"):
        resolve_device("cuda", "auto", unsaid[4])


def _tasks(numbers: list[int]) -> list[Task]:
    entries = [PromptEntry(f"p{i}", (TextEntry("x"),), None, i + 1, "x") for i in range(len(numbers))]
    return [
        Task(entry, index) for entry, count in zip(entries, numbers, strict=True) for index in range(count)
    ]


@given(st.lists(st.integers(0, 20), max_size=20), st.integers(1, 16))
def test_batches_hold_every_task_once_in_order(numbers: list[int], size: int) -> None:
    tasks = _tasks(numbers)
    batches = cut_batches(tasks, size)
    assert [task for batch in batches for task in batch] == tasks
    assert all(0 < len(batch) <= size for batch in batches)
    assert all(len(batch) >= 0.75 * size for batch in batches[:-1])


@pytest.mark.parametrize(
    ("num_images", "sizes"), [(4, [16, 16, 8]), (5, [15, 15, 15, 5]), (9, [16, 16, 13, 16, 16, 13])]
)
def test_pictures_of_a_prompt_stay_together_where_batches_stay_full(
    num_images: int, sizes: list[int]
) -> None:
    batches = cut_batches(_tasks([num_images] * 10), 16)
    assert [len(batch) for batch in batches] == sizes
    together = sum(len({task.entry.id for task in batch}) for batch in batches) == 10
    assert together == (num_images < 9)


@pytest.mark.parametrize("share", [1, 2, 9, 10, 50, 10_000])
def test_none_takes_more_than_its_share_at_a_time(share: int) -> None:
    """What is taken is claimed: what a process looks at, and what it makes ready beyond that."""
    options = bound_stream(None, share, Process(1, 3, 1, 3))
    assert 1 <= options.window + options.ahead <= share
    assert options.window <= bound_stream(None, share, ALONE).window
