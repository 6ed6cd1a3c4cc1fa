"""What stops a run, through the command line: one line on standard error, exit code 1, nothing lost."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.train.rga_runs import assert_same_weights, build_recipe, read_log, start, write_recipe
from train.ranks import Ranks
from train.replay import Replayer
from train.rga import main, run
from train.rollouts import Roller

FEW_BYTES = 300_000  # a row and an event fit, a checkpoint does not


@pytest.mark.slow
def test_a_reward_that_is_no_number_stops_the_command(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.toml", {"reward": "function:tests.train.rewards:broken"})
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = start(path, tmp_path / "out", **pipes)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 1, said
    assert said.startswith("stopped: reward function:tests.train.rewards:broken: sample '0/0'")
    assert "the score is nan" in said
    assert len(said.splitlines()) == 1


def run_main(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command says before it ends, in this process."""
    monkeypatch.setattr(sys, "argv", ["rga", str(recipe), "--out", str(out), "--device", "cpu"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert len(str(caught.value.code).splitlines()) == 1
    return str(caught.value.code)


def test_a_first_ratio_off_one_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that change between rollout and replay, which no recipe can ask for."""
    roll = Roller.roll

    def roll_and_change(self: Roller, *given: object) -> list:
        made = roll(self, *given)
        name = "decoder.layers.1.gen.down_proj.weight"
        self.engine.publish({name: 1.01 * self.engine.model.get_parameter(name).detach()})
        return made

    monkeypatch.setattr(Roller, "roll", roll_and_change)
    said = run_main(write_recipe(tmp_path / "recipe.toml"), tmp_path / "out", monkeypatch)
    assert said.startswith("stopped: the first ratio of iteration 1 is off one by 0.")
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_too_little_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB")

    monkeypatch.setattr(Replayer, "replay", fail)
    said = run_main(write_recipe(tmp_path / "recipe.toml"), tmp_path / "out", monkeypatch)
    assert said.startswith("stopped: memory ran out; lower rollout.batch_size")


@contextmanager
def few_bytes() -> Iterator[None]:
    """While no file of this process may grow larger, as if the disk were full there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FEW_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_finds_no_room_is_refused_and_the_last_good_one_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system itself refuses to write it whole."""
    run(build_recipe(tmp_path, {"iterations": 2}), tmp_path / "whole", Ranks())
    run(build_recipe(tmp_path, {"iterations": 1}), tmp_path / "out", Ranks())
    recipe = build_recipe(tmp_path, {"iterations": 2})
    with few_bytes():
        said = run_main(tmp_path / "recipe.toml", tmp_path / "out", monkeypatch)
    assert said.startswith(f"stopped: {tmp_path / 'out'} cannot be written to (")
    assert [p.name for p in (tmp_path / "out" / "checkpoints").glob("step-*")] == ["step-00000001"]
    run(recipe, tmp_path / "out", Ranks())
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
    assert [row["step"] for row in read_log(tmp_path / "out")] == [1, 2]
