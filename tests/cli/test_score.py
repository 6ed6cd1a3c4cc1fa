"""`realign score`: scores of every picture, once; killed anywhere, it goes on; bad input is refused."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realign.cli import score as command
from realign.cli.__main__ import main
from realign.cli.scores import SCORES, load_scores
from tests.cli.quick import die_at
from tests.cli.support import Workplace, list_files, read_records

MODULE = """
import numpy as np
from pathlib import Path
def red(samples):
    with open({log!r}, "a") as file:
        file.writelines(f"{{s.name}}|{{s.prompt}}|{{len(s.references)}}\\n" for s in samples)
    return [float(np.asarray(s.picture)[..., 0].mean()) for s in samples]
def one(samples):
    return [1.0 for _ in samples]
def half(samples):
    if any(s.name == "last/0" for s in samples): raise ValueError("no\\nway")
    return [0.5 for _ in samples]
"""
RED = "function:own_rewards_cli:red"


@pytest.fixture
def made(place: Workplace, mixed: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A generated folder, and a module of rewards that writes down what it scored."""
    (place.folder / "own_rewards_cli.py").write_text(MODULE.format(log=str(place.folder / "log")))
    monkeypatch.syspath_prepend(place.folder)
    monkeypatch.delitem(sys.modules, "own_rewards_cli", raising=False)
    assert place.generate(mixed, "--num-images", 2).code == 0
    return place


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / SCORES).read_text(encoding="utf-8").splitlines()]


def scored_names(place: Workplace) -> list[str]:
    lines = (place.folder / "log").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return [line.split("|")[0] for line in lines]


def test_every_picture_gets_its_score(made):
    outcome = made.run("score", made.out, "--reward", f"{RED}*2+function:own_rewards_cli:one")
    assert outcome.code == 0
    rows, records = read_rows(made.out), read_records(made.out)
    assert [row["request"] for row in rows] == [record["request"] for record in records]
    for row, record in zip(rows, records, strict=True):
        with Image.open(made.out / record["file"]) as image:
            mean = float(np.asarray(image)[..., 0].mean())
        assert row["parts"] == {RED: pytest.approx(mean), "function:own_rewards_cli:one": 1.0}
        assert row["score"] == pytest.approx(2 * mean + 1)
    summary = json.loads(outcome.out)
    values = [row["score"] for row in rows]
    assert (summary["n"], summary["mean"]) == (8, pytest.approx(np.mean(values)))
    assert summary["se"] == pytest.approx(np.std(values, ddof=1) / 8**0.5)
    assert summary["parts"]["function:own_rewards_cli:one"] == 1.0
    page = (made.out / "index.html").read_text(encoding="utf-8")
    assert page.count(f"<b>{values[0]:.3f}</b>") >= 1
    lines = (made.folder / "log").read_text(encoding="utf-8").splitlines()
    assert "two/0|put on|2" in lines, "the prompt's texts and its references"


def test_again_does_nothing_and_other_rewards_are_kept(made):
    assert made.run("score", made.out, "--reward", RED).code == 0
    before = (made.out / SCORES).read_bytes()
    assert made.run("score", made.out, "--reward", RED).code == 0
    assert (made.out / SCORES).read_bytes() == before
    assert len(scored_names(made)) == 8
    assert made.run("score", made.out, "--reward", "function:own_rewards_cli:one").code == 0
    assert len(read_rows(made.out)) == 16
    assert made.run("score", made.out, "--reward", RED, "--again").code == 0
    assert len(scored_names(made)) == 16
    assert len(read_rows(made.out)) == 16


def test_scores_stay_when_pictures_are_added(made, mixed):
    made.run("score", made.out, "--reward", RED)
    shutil.rmtree(made.out / "images")
    assert made.generate(mixed, "--num-images", 2).code == 0, "all pictures are made again"
    assert len(load_scores(made.out)) == 8
    assert "own_rewards_cli:red" in (made.out / "index.html").read_text(encoding="utf-8")


def run_killed(folder: Path, kill_at: int) -> None:
    command.BATCH_SIZE = 3
    die_at(kill_at)
    main(["score", str(folder), "--reward", RED, "--device", "cpu"])


def test_killed_anywhere_it_goes_on(made, monkeypatch):
    monkeypatch.setattr(command, "BATCH_SIZE", 3)
    whole = made.folder / "whole"
    shutil.copytree(made.out, whole)
    assert made.run("score", whole, "--reward", RED).code == 0
    files, kills = list_files(whole), 0
    for kill_at in range(40):
        folder = made.folder / f"killed-{kill_at}"
        shutil.copytree(made.out, folder)
        process = multiprocessing.get_context("fork").Process(target=run_killed, args=(folder, kill_at))
        process.start()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        (made.folder / "log").unlink(missing_ok=True)
        if (folder / SCORES).exists():
            with (folder / SCORES).open("a") as file:
                file.write('{"request": "torn')
        assert made.run("score", folder, "--reward", RED).code == 0
        assert (folder / SCORES).read_bytes() == (whole / SCORES).read_bytes(), kill_at
        assert list_files(folder) == files
        if process.exitcode == 0:
            break
    assert kills >= 6, "so many moments of a run"


def test_a_reward_that_fails_keeps_what_was_scored(made, monkeypatch):
    monkeypatch.setattr(command, "BATCH_SIZE", 2)
    outcome = made.run("score", made.out, "--reward", "function:own_rewards_cli:half")
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith(
        "realign: error: reward function:own_rewards_cli:half: raised ValueError: no way"
    )
    assert len(read_rows(made.out)) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reward", "nope"], "--reward: reward 'nope' is not known"),
        (["--reward", "clip:/no/where"], "--reward: clip '/no/where'"),
        (["--reward", "oracle", "--device", "tpu"], "--device tpu: give auto, cpu, cuda or cuda:N"),
        ([], "required: --reward"),
        (["--reward", "oracle", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_arguments(made, arguments, said):
    outcome = made.run("score", made.out, *arguments)
    assert (outcome.code, outcome.out, len(outcome.err.splitlines())) == (2, "", 1)
    assert said in outcome.err
    assert not (made.out / SCORES).exists()


def test_a_folder_that_is_none(place):
    for name in ("absent", "."):
        outcome = place.run("score", place.folder / name, "--reward", "oracle")
        assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
        assert "run.json" in outcome.err


def test_a_folder_that_is_in_use(made):
    import fcntl

    with (made.out / ".realign" / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        outcome = made.run("score", made.out, "--reward", RED)
    assert outcome.code == 2
    assert "another realign process" in outcome.err


def test_a_picture_that_is_gone_is_named(made):
    (made.out / read_records(made.out)[3]["file"]).unlink()
    outcome = made.run("score", made.out, "--reward", RED)
    assert outcome.code == 1
    assert read_records(made.out)[3]["file"] in outcome.err
