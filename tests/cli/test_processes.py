"""Several processes share a run: one folder, every picture once, whoever dies, and on with any number."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from realign.cli import console
from realign.cli.generate import PreparedRun
from tests.cli.quick import snapshot
from tests.cli.ranks import Launch, MeetingEngine, Rank, wait_until
from tests.cli.support import ROOT, Outcome, Workplace, read_pictures, read_records

NUM_PROMPTS = 12
NUM_IMAGES = 2


@pytest.fixture(params=["jsonl", "geneval"])
def command(place: Workplace, request: pytest.FixtureRequest) -> list[object]:
    """A command in each layout; its last word is the folder."""
    if request.param == "geneval":
        rows = ({"tag": "t", "include": [], "prompt": f"text {i}"} for i in range(NUM_PROMPTS))
    else:
        place.write_picture("a.png")
        parts = [{"image": "a.png"}, {"text": "x"}]
        rows = ({"id": f"p{i}", "prompt": parts} for i in range(NUM_PROMPTS))
    prompts = place.write_prompts(*rows)
    return ["generate", prompts, "--format", request.param, "--num-images", NUM_IMAGES, "--batch-size", 2,
            "--model", place.model, "--device", "cpu", "--out", place.out]  # fmt: skip


@pytest.fixture
def expected(place: Workplace, command: list[object], quick: None) -> dict[str, bytes]:
    """What one process leaves that nothing disturbs."""
    undisturbed = place.folder / "undisturbed"
    assert place.run(*command[:-1], undisturbed).code == 0
    return snapshot(undisturbed)


def _launch(place: Workplace, command: list[object], world_size: int, port: int = 29500) -> Launch:
    return Launch(place.folder / "launches", command, world_size, port)


@pytest.mark.parametrize("world_size", [2, 3])
def test_they_share_the_work_and_leave_one_folder(
    place: Workplace,
    command: list[object],
    expected: dict[str, bytes],
    world_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meeting = place.folder / "meeting"
    monkeypatch.setattr(PreparedRun, "load_engine", lambda self: MeetingEngine(meeting, world_size))
    ended = _launch(place, command, world_size).run()
    assert [one.code for one in ended] == [0] * world_size
    assert snapshot(place.out) == expected
    shares = MeetingEngine.read(meeting)
    assert len(shares) == world_size
    made = [request for share in shares.values() for request in share]
    assert sorted(made) == sorted(record["request"] for record in read_records(place.out))
    # The first speaks for all: one note, the last count, one result.
    total = NUM_PROMPTS * NUM_IMAGES
    assert (
        ended[0]
        .err.splitlines()[0]
        .endswith(f"2 at a time, cpu, float32, attention none, {world_size} processes")
    )
    assert ended[0].err.splitlines()[-1].startswith(f"realign: {total}/{total} pictures, ")
    assert ended[0].out.startswith(f"{total} pictures ({total} new) in {place.out}; look at them in ")
    assert ended[0].out.count("\n") == 1
    assert all(one.err == one.out == "" for one in ended[1:])


def test_the_gallery_is_that_of_one_process(
    place: Workplace, command: list[object], expected: dict[str, bytes]
) -> None:
    _launch(place, command, 2).run()
    pages = [(folder / "index.html").read_text() for folder in (place.out, place.folder / "undisturbed")]
    lines = [[line for line in page.splitlines() if "&#34;created&#34;" not in line] for page in pages]
    assert lines[0] == lines[1]


def test_one_is_killed_at_any_write_and_the_others_do_its_work(
    place: Workplace, command: list[object], expected: dict[str, bytes]
) -> None:
    """Killed at its first write, at its second, and so on; the first process and another in turn."""
    kills = 0
    for kill_at in range(24):
        command[-1] = place.folder / str(kill_at)
        moments = [None, None, None]
        moments[kill_at % 3] = kill_at // 2
        ended = _launch(place, command, 3).run(moments)
        read_pictures(command[-1])  # what has its name is whole
        kills += ended[kill_at % 3].code == -9
        assert [one.code for i, one in enumerate(ended) if i != kill_at % 3] == [0, 0]
        left = snapshot(command[-1])
        # It may have come, and died, after the others had ended.
        assert {name: left[name] for name in left if not name.startswith(".realign/tmp")} == expected, kill_at
    assert kills >= 6


@pytest.mark.parametrize("seed", range(2))
def test_all_are_killed_and_others_go_on(
    place: Workplace, command: list[object], expected: dict[str, bytes], seed: int
) -> None:
    rng = random.Random(seed)
    for world_size in (3, 2, 1, 2, 3):
        moments = [rng.randrange(12) for _ in range(world_size)]
        _launch(place, command, world_size).run(moments)
        read_pictures(place.out)
    ended = _launch(place, command, 1 + seed).run()
    assert all(one.code == 0 for one in ended)
    assert snapshot(place.out) == expected


def test_who_comes_late_finds_it_done(
    place: Workplace, command: list[object], expected: dict[str, bytes]
) -> None:
    launch = _launch(place, command, 3)
    assert launch.start(1).wait().code == 0  # alone it does all there is
    before = {path: path.stat().st_mtime_ns for path in place.out.rglob("*.png")}
    assert [launch.start(rank).wait().code for rank in (2, 0)] == [0, 0]
    assert before == {path: path.stat().st_mtime_ns for path in place.out.rglob("*.png")}
    assert snapshot(place.out) == expected


@pytest.fixture
def held(
    place: Workplace, command: list[object], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], list[Rank]]]:
    """Starts processes, each of which stays in its first batch until the folder `meeting` has nine files."""
    monkeypatch.setattr(console, "HEAD_START_SECONDS", 0.0)
    meeting = place.folder / "meeting"
    monkeypatch.setattr(PreparedRun, "load_engine", lambda self: MeetingEngine(meeting, 9))
    ranks: list[Rank] = []

    def start(world_size: int) -> list[Rank]:
        launch = _launch(place, command, world_size)
        ranks.extend(launch.start(rank) for rank in range(world_size))
        wait_until(lambda: meeting.exists() and len(list(meeting.iterdir())) == world_size)
        return ranks

    yield start
    for rank in ranks:
        with suppress(ProcessLookupError, ChildProcessError):
            rank.kill()


@pytest.mark.parametrize("command", ["jsonl"], indirect=True)
def test_another_launch_is_refused_while_one_is_at_work(
    place: Workplace, command: list[object], held: Callable[[int], list[Rank]]
) -> None:
    ranks = held(2)
    others = _launch(place, command, 3, port=29501).run()
    assert [one.code for one in others] == [2, 2, 2]
    assert [len(one.err.splitlines()) for one in others] == [1, 0, 0]
    assert "another realign process (pid" in others[0].err
    assert place.run(*command).code == 2
    # One of them dead, the run is still the other's.
    assert ranks[0].kill().code == -9
    assert place.run(*command).code == 2
    for number in range(7):
        (place.folder / "meeting" / f"guest-{number}").touch()
    assert ranks[1].wait().code == 0
    assert len(read_records(place.out)) == NUM_PROMPTS * NUM_IMAGES


@pytest.mark.parametrize("command", ["jsonl"], indirect=True)
def test_processes_are_refused_while_one_alone_is_at_work(
    place: Workplace, command: list[object], held: Callable[[int], list[Rank]]
) -> None:
    held(1)
    ended = _launch(place, command, 2).run()
    assert [one.code for one in ended] == [2, 2]
    assert [len(one.err.splitlines()) for one in ended] == [1, 0]


def test_the_gallery_of_a_run_that_goes_on_has_what_each_has_made(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    prompts = place.write_prompts(*({"id": f"p{i}", "prompt": "x"} for i in range(4)))
    place.generate(prompts)
    lines = (place.out / "records.jsonl").read_bytes().splitlines(keepends=True)
    (place.out / ".realign" / "records").mkdir()
    (place.out / ".realign" / "records" / "one.jsonl").write_bytes(b"".join(lines[1:]))
    (place.out / "records.jsonl").write_bytes(b"".join(lines[:2]))
    assert place.run("gallery", place.out).code == 0
    assert "<b>4</b> pictures of <b>4</b> prompts" in (place.out / "index.html").read_text()


def test_a_disk_without_locks_is_for_one_process(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    prompts = place.write_prompts({"id": "a", "prompt": "x"})
    for name in ("lockf", "flock"):
        monkeypatch.setattr(fcntl, name, refuse)
        with monkeypatch.context() as several:
            several.setenv("WORLD_SIZE", "2")
            outcome = _as_rank(place, several, 0, prompts)
        assert outcome.code == 2
        assert re.fullmatch(r"realign: error: --out .*: is on a disk without locks, .*\n", outcome.err)
        monkeypatch.undo()
    monkeypatch.setattr(fcntl, "flock", refuse)
    outcome = place.generate(prompts)
    assert outcome.code == 0
    assert outcome.err.startswith("realign: warning: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 1), "--steps 1: give a number"),
        (("--steps", "x"), "argument --steps: invalid int value"),
        (("--model", "nowhere"), "--model nowhere: nowhere is not a folder"),
    ],
    ids=["value", "argument", "model"],
)
def test_a_refusal_is_said_once(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, arguments: tuple, message: str
) -> None:
    monkeypatch.setattr(console, "HEAD_START_SECONDS", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "3")
    prompts = place.write_prompts({"id": "a", "prompt": "x"})
    said = [_as_rank(place, monkeypatch, rank, prompts, *arguments) for rank in range(3)]
    assert [one.code for one in said] == [2, 2, 2]
    assert [len(one.err.splitlines()) for one in said] == [1, 0, 0]
    assert message in said[0].err
    assert not place.out.exists()


def _as_rank(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, rank: int, prompts: Path, *arguments: object
) -> Outcome:
    monkeypatch.setenv("RANK", str(rank))
    return place.generate(prompts, *arguments)


def test_what_fails_on_the_way_each_says_for_itself(
    place: Workplace, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "replace", fail)
    outcome = _as_rank(place, monkeypatch, 1, place.write_prompts({"id": "a", "prompt": "x"}))
    assert outcome.code == 1
    assert outcome.err.startswith(
        "realign: error: rank 1 of 2: [Errno 28] No space left on device; what is done"
    )
    assert outcome.err.count("\n") == 1


def test_the_demo_is_for_one_process(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    outcome = place.run("demo", "--out", place.out)
    assert outcome.code == 2
    assert outcome.err.startswith("realign: error: demo: runs in one process; start several with")
    assert not place.out.exists()


@pytest.mark.slow
def test_torchrun_killed_then_on_with_fewer(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing on mini: three processes, one killed as the first picture appears; then two of them."""
    place.write_picture("a.png", (64, 64))
    texts = ({"id": f"t{i}", "prompt": f"a red star, {i} blue rings"} for i in range(8))
    with_picture = [{"image": "a.png"}, {"text": "draw the object of image 1 at the top left"}]
    prompts = place.write_prompts(*texts, {"id": "picture", "prompt": with_picture})
    arguments = [prompts, "--device", "cpu", "--steps", 4, "--batch-size", 2, "--num-images", 4]
    undisturbed = place.folder / "undisturbed"
    assert place.run("generate", *arguments, "--out", undisturbed).code == 0

    with _torchrun(place, 3, arguments) as killed:
        wait_until(lambda: list(place.out.glob("images/*.png")) or killed.poll() is not None)
        os.kill(_find_rank(killed.pid, 1), 9)
        assert killed.wait() == 1
    assert 0 < len(read_pictures(place.out)) < 36

    with _torchrun(place, 2, arguments) as fewer:
        out, err = fewer.communicate()
    assert fewer.returncode == 0, err
    assert "are there already" in err
    assert out.startswith("36 pictures (")
    assert snapshot(place.out) == snapshot(undisturbed)


@contextmanager
def _torchrun(
    place: Workplace, num_processes: int, arguments: list[object]
) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes,
             "-m", "realign.cli", "generate", *arguments, "--out", place.out]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command, pipe = [str(word) for word in words], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.terminate()  # it ends its own


def _find_rank(parent: int, rank: int) -> int:
    """The process id of a rank that torchrun, process `parent`, has started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    return next(
        int(pid) for pid in children if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
