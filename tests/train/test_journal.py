"""What a run writes of itself: rows and TensorBoard's events say the same, each step once."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.rga_runs import FULL, build_recipe, read_log, start, write_recipe
from tests.train.test_rga import wait_for_a_new_checkpoint
from train import journal
from train.journal import Journal, load_rows, name_numbers
from train.progress import Progress
from train.ranks import Ranks
from train.rga import run

ROW = {"reward": 0.25, "spread": 0.5, "images_per_second": 3.0, "seconds": {"rollout": 1.5}}


def read_events(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def assert_events_are_the_rows(out: Path) -> None:
    events, rows = read_events(out), read_log(out)
    wanted = {}
    for row in rows:
        for tag, value in name_numbers(row, "train"):
            wanted.setdefault(tag, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    found = {tag for tag in events.Tags()["scalars"] if tag.startswith("train")}
    assert found == set(wanted)
    for tag, pairs in wanted.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == pairs, tag


def test_a_run_in_pieces_has_every_number_once(tmp_path: Path) -> None:
    reward = "function:tests.train.rewards:brightness*2+function:tests.train.rewards:redness"
    for iterations in (2, 3):
        recipe = build_recipe(tmp_path, FULL, {"iterations": iterations, "reward": reward})
        run(recipe, tmp_path / "out", Ranks())
    assert_events_are_the_rows(tmp_path / "out")
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 2, "one file for each part of the run"
    [text] = read_events(tmp_path / "out").Tensors("recipe/text_summary")
    assert b"brightness*2" in text.tensor_proto.string_val[0]
    wanted = {
        "reward", "spread", "degenerate", "distinct_chains", "failures", "ratio_mean", "ratio_min",
        "ratio_max", "clipped_low", "clipped_high", "kl", "grad_norm", "lr", "images_per_second", "memory_gb",
    }  # fmt: skip
    tags = set(read_events(tmp_path / "out").Tags()["scalars"])
    assert tags >= {f"train/{name}" for name in wanted}
    assert tags >= {f"train_seconds/{name}" for name in ("rollout", "reward", "reference", "update")}
    assert tags >= {
        f"train_rewards/function:tests.train.rewards:{name}" for name in ("brightness", "redness")
    }


@pytest.mark.slow
def test_a_killed_run_has_every_number_once(tmp_path: Path) -> None:
    """kill -9 some iterations after the checkpoint: their events are there, and are then hidden."""
    path = write_recipe(tmp_path / "recipe.toml", {"iterations": 40, "checkpoint_every": 4})
    process = start(path, tmp_path / "out", stdout=subprocess.DEVNULL)
    wait_for_a_new_checkpoint(tmp_path / "out", process)
    while process.poll() is None and len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) < 6:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "model").exists(), "it was not killed in time"
    assert start(path, tmp_path / "out", stdout=subprocess.DEVNULL).wait(timeout=600) == 0
    assert [row["step"] for row in read_log(tmp_path / "out")] == list(range(1, 41))
    assert_events_are_the_rows(tmp_path / "out")


def test_evaluations_have_pictures_and_stay_where_training_goes_back(tmp_path: Path) -> None:
    row = {"step": 0, "reward": 0.5, "rewards": {"clip": 0.25}}
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    with closing(Journal(tmp_path, 0)) as first:
        first.add_evaluation(row, {"t2i 0": red})
        first.add_row({"step": 1, **ROW})
        first.add_evaluation({**row, "step": 1}, {"t2i 0": red})
    with closing(Journal(tmp_path, 0)) as again:
        assert again.has_evaluation(0)
        assert not again.has_evaluation(1)
        again.add_row({"step": 1, **ROW})
        again.add_evaluation({**row, "step": 1}, {"t2i 0": red})
    assert [row["step"] for row in load_rows(tmp_path / "evaluations.jsonl")] == [0, 1]
    events = read_events(tmp_path)
    assert [e.step for e in events.Scalars("evaluation_rewards/clip")] == [0, 1]
    assert [e.step for e in events.Scalars("train/reward")] == [1]
    shown = events.Images("evaluation/t2i 0")
    assert [image.step for image in shown] == [0, 1]
    picture = Image.open(io.BytesIO(shown[0].encoded_image_string))
    assert (picture.size, picture.getpixel((0, 0))) == ((4, 3), (255, 0, 0))


def test_without_tensorboard_rows_are_written_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(journal, "find_spec", lambda name: None)
    with closing(Journal(tmp_path, 0)) as written:
        written.add_row({"step": 1, **ROW})
        written.add_evaluation({"step": 1, "reward": 1.0}, {"a": Image.new("RGB", (2, 2))})
    assert not (tmp_path / "tensorboard").exists()
    assert [row["step"] for row in load_rows(tmp_path / "log.jsonl")] == [1]
    said = capsys.readouterr().err
    assert "tensorboard is not installed" in said
    assert len(said.splitlines()) == 1


def test_a_torn_row_is_taken_back(tmp_path: Path) -> None:
    whole = json.dumps({"step": 1, **ROW}) + "\n"
    (tmp_path / "log.jsonl").write_text(whole + '{"step": 2, "rew')
    with closing(Journal(tmp_path, 2)):
        assert (tmp_path / "log.jsonl").read_text() == whole


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture) -> None:
    with Progress(4, 1, is_shown=True) as progress:
        for step in (2, 3, 4):
            progress.advance({"step": step, **ROW})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["2/4", "3/4", "4/4"]
    for part in ("reward 0.2500", "spread 0.5000", "s/it", "3 images/s", "left"):
        assert part in lines[0]
    assert lines[-1].endswith("0 s left")


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Progress(4, 0, is_shown=True) as progress:
        progress.say("evaluation at 0: reward 0.5 [of 3]")
        progress.advance({"step": 1, **ROW})
    shown = terminal.getvalue()
    assert "\x1b[" in shown
    for part in ("evaluation at 0: reward 0.5 [of 3]", "1/4", "reward 0.2500", "3 images/s", "left"):
        assert part in shown


def test_progress_of_another_process_says_nothing(capsys: pytest.CaptureFixture) -> None:
    with Progress(4, 0, is_shown=False) as progress:
        progress.advance({"step": 1, **ROW})
        progress.say("anything")
    assert capsys.readouterr().out == ""
