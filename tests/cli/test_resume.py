"""Nothing is lost: killed at any moment, the same command ends with what an undisturbed run gives."""

import io
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from realign.cli.__main__ import main
from realign.cli.files import Staging, dump_line, load_lines
from realign.cli.folder import RunFolder
from realign.cli.generate import PreparedRun
from tests.cli.quick import QuickEngine, die_at, snapshot
from tests.cli.support import ROOT, Workplace, list_files, read_pictures, read_records

NUM_PROMPTS = 30


@pytest.fixture
def prompts(place: Workplace) -> Path:
    place.write_picture("a.png")
    rows = [
        {"id": f"p{i}", "prompt": [{"image": "a.png"}, {"text": f"text {i}"}]} for i in range(NUM_PROMPTS)
    ]
    return place.write_prompts(*rows)


def run_in_child(arguments: Sequence[object], kill_at: int) -> bool:
    """Run the command in a forked process that is killed at its write number `kill_at`; whether it was.

    A write is a sync or a move; even numbers die just before one, odd ones just after.
    """
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            die_at(kill_at)
            code = main([str(argument) for argument in arguments])
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("format", ["jsonl", "geneval"])
def test_killed_at_every_write(place: Workplace, prompts: Path, quick: None, format: str) -> None:
    """One run killed at its first write, another at its second, and so on; each then goes on."""
    prompts = _few_prompts(place, format)
    settings = (
        "--format",
        format,
        "--num-images",
        2,
        "--batch-size",
        3,
        "--model",
        place.model,
        "--device",
        "cpu",
    )
    undisturbed = place.folder / "undisturbed"
    assert place.run("generate", prompts, "--out", undisturbed, *settings).code == 0
    expected = snapshot(undisturbed)
    for kill_at in count():
        out = place.folder / str(kill_at)
        killed = run_in_child(["generate", prompts, "--out", out, *settings], kill_at)
        read_pictures(out)  # what has its name is whole
        assert not killed or place.run("generate", prompts, "--out", out, *settings).code == 0
        assert snapshot(out) == expected, kill_at
        if not killed:
            break
    assert kill_at > 24


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(place: Workplace, prompts: Path, quick: None, seed: int) -> None:
    """One run killed ten times, at random writes."""
    rng = random.Random(seed)
    command = ["generate", prompts, "--out", place.out, "--model", place.model, "--device", "cpu"]
    kills = sum(run_in_child(command, rng.randrange(40)) for _ in range(10))
    assert kills >= 5
    undisturbed = place.folder / "undisturbed"
    for out in (place.out, undisturbed):
        assert place.run(*command, "--out", out).code == 0
    assert snapshot(place.out) == snapshot(undisturbed)
    assert len(read_records(place.out)) == NUM_PROMPTS


def _few_prompts(place: Workplace, format: str) -> Path:
    if format == "geneval":
        return place.write_prompts(*({"tag": "t", "include": [], "prompt": f"text {i}"} for i in range(2)))
    parts = [{"image": "a.png"}, {"text": "x"}]
    return place.write_prompts(*({"id": f"p{i}", "prompt": parts} for i in range(2)))


def test_the_real_command_killed(place: Workplace, mixed: Path) -> None:
    """`python -m realign.cli` in a process of its own, killed twice while it makes pictures."""
    settings = ["--model", place.model, "--device", "cpu", "--steps", 6, "--batch-size", 2, "--num-images", 4,
                "--reasoning", "ic-cot", "--temperature", 1, "--max-reasoning-tokens", 12]  # fmt: skip
    undisturbed = place.folder / "undisturbed"
    assert place.run("generate", mixed, "--out", undisturbed, *settings).code == 0
    words = [sys.executable, "-m", "realign.cli", "generate", mixed, "--out", place.out, *settings]
    command = [str(word) for word in words]
    rng = random.Random(1)
    for goal in (1, 7):
        _kill_when(place.out, goal, rng.uniform(0, 0.1), command)
    last = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert last.returncode == 0, last.stderr
    assert "are there already" in last.stderr
    assert _compare(place.out, undisturbed) <= 1
    assert not list((place.out / ".realign" / "tmp").iterdir())


def _kill_when(folder: Path, num_pictures: int, delay: float, command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT)
    while len(list(folder.glob("images/*.png"))) < num_pictures and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.wait()


def _compare(one: Path, other: Path) -> int:
    """The largest difference of a pixel; all else must be equal. A kill changes how batches are cut."""
    assert (one / "records.jsonl").read_bytes() == (other / "records.jsonl").read_bytes()
    pictures = read_pictures(one), read_pictures(other)
    assert pictures[0].keys() == pictures[1].keys()
    return max(
        abs(_pixels(content) - _pixels(pictures[1][name])).max() for name, content in pictures[0].items()
    )


def _pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)), dtype=int)


def _tear_last_record(folder: Path) -> None:
    content = (folder / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(content[:-20])


def _lose_records(folder: Path) -> None:
    (folder / "records.jsonl").unlink()


def _garble_a_record(folder: Path) -> None:
    lines = (folder / "records.jsonl").read_bytes().split(b"\n")
    lines[2] = b"\xff\x00{"
    (folder / "records.jsonl").write_bytes(b"\n".join(lines))


def _repeat_a_record(folder: Path) -> None:
    content = (folder / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(content + content.split(b"\n")[0] + b"\n")


def _lose_a_picture(folder: Path) -> None:
    (folder / "images" / "p3.png").unlink()


def _cut_a_picture(folder: Path) -> None:
    content = (folder / "images" / "p3.png").read_bytes()
    (folder / "images" / "p3.png").write_bytes(content[:-20])


def _flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "images" / "p3.png").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "images" / "p3.png").write_bytes(content)


def _take_a_picture_from_elsewhere(folder: Path) -> None:
    _garble_a_record(folder)
    Image.new("RGB", (24, 16)).save(folder / "images" / "p2.png")


def _leave_staged_files(folder: Path) -> None:
    (folder / ".realign" / "tmp" / "77-1").write_bytes(b"half")
    (folder / ".realign" / "tmp" / "77-2" / "samples").mkdir(parents=True)


def _leave_records_of_several_processes(folder: Path) -> None:
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (folder / ".realign" / "records").mkdir()
    (folder / ".realign" / "records" / "one.jsonl").write_bytes(b"".join(lines[20:]))
    (folder / ".realign" / "records" / "two.jsonl").write_bytes(b"".join(lines[10:22])[:-5])
    (folder / "records.jsonl").write_bytes(b"".join(lines[:10]))


def _shuffle_records(folder: Path) -> None:
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join(reversed(lines)))


@pytest.mark.parametrize(
    ("damage", "num_new"),
    [
        (_tear_last_record, 0),
        (_lose_records, 0),
        (_garble_a_record, 0),
        (_repeat_a_record, 0),
        (_leave_records_of_several_processes, 0),
        (_shuffle_records, 0),
        (_leave_staged_files, 0),
        (_lose_a_picture, 1),
        (_cut_a_picture, 1),
        (_flip_a_bit, 1),
        (_take_a_picture_from_elsewhere, 1),
    ],
)
def test_damage_is_mended(place: Workplace, prompts: Path, quick: None, damage: object, num_new: int) -> None:
    assert place.generate(prompts).code == 0
    before = snapshot(place.out)
    damage(place.out)
    outcome = place.generate(prompts)
    assert outcome.code == 0
    assert outcome.out.startswith(f"{NUM_PROMPTS} pictures ({num_new} new)")
    assert snapshot(place.out) == before


def test_pictures_that_vanish_on_the_way_are_missed(
    place: Workplace, prompts: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunFolder.save_picture
    monkeypatch.setattr(RunFolder, "save_picture", lambda self, task, *rest: None)
    outcome = place.generate(prompts)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        f"realign: error: 30 of 30 pictures are missing; what is done is in {place.out}; "
        "run the same command again to go on"
    )
    monkeypatch.setattr(RunFolder, "save_picture", save)
    assert place.generate(prompts).code == 0


def test_a_folder_killed_before_its_settings_were_written(
    place: Workplace, prompts: Path, quick: None
) -> None:
    (place.out / ".realign" / "tmp").mkdir(parents=True)
    (place.out / ".realign" / "tmp" / "5-1").write_bytes(b"{")
    assert place.generate(prompts).code == 0


def test_interrupt_says_how_to_go_on(
    place: Workplace, prompts: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = QuickEngine.stream

    def stop(self: QuickEngine, requests: Iterable, options: object) -> Iterator[SimpleNamespace]:
        yield from islice(stream(self, requests, options), 7)
        raise KeyboardInterrupt

    monkeypatch.setattr(QuickEngine, "stream", stop)
    outcome = place.generate(prompts)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == (
        f"realign: stopped; what is done is in {place.out}; run the same command again to go on"
    )
    assert len(read_records(place.out)) == 7
    monkeypatch.setattr(QuickEngine, "stream", stream)
    assert place.generate(prompts).out.startswith("30 pictures (23 new)")


def test_a_full_disk_stops_with_one_line(
    place: Workplace, prompts: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(target).name == "p5.png":
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    outcome = place.generate(prompts)
    assert outcome.code == 1
    assert "No space left on device" in outcome.err.splitlines()[-1]
    assert "run the same command again" in outcome.err.splitlines()[-1]
    monkeypatch.setattr(os, "replace", replace)
    assert place.generate(prompts).out.startswith("30 pictures (25 new)")


def test_a_reference_changed_on_the_way_stops_the_run(
    place: Workplace, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: PreparedRun) -> QuickEngine:
        place.write_picture("a.png", (40, 40))
        return QuickEngine()

    monkeypatch.setattr(PreparedRun, "load_engine", load)
    outcome = place.generate(prompts)
    assert outcome.code == 1
    assert "was changed while the run was going on" in outcome.err


def test_staged_files_are_whole_or_absent(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "tmp")

    def write(file) -> None:
        file.write(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        staging.write(tmp_path / "a" / "b.txt", write)
    assert not (tmp_path / "a" / "b.txt").exists()
    staging.clear()
    assert list_files(tmp_path) == []
    staging.write_text(tmp_path / "a" / "b.txt", "whole")
    assert list_files(tmp_path) == ["a/b.txt"]


def test_records_are_one_line_for_every_reader(tmp_path: Path) -> None:
    record = {"text": "a\nb\r\u2028c\u2029d\x85e\x0b\x1c红"}
    path = tmp_path / "records.jsonl"
    path.write_text(dump_line(record) + dump_line([1]) + dump_line({"last": 1})[:-1], encoding="utf-8")
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    assert list(load_lines(path)) == [record]
    assert "红" in path.read_text(encoding="utf-8")
    shutil.rmtree(tmp_path)
    assert list(load_lines(path)) == []
