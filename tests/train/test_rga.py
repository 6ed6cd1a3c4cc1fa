"""Alignment: the reward rises, a killed run ends as an undisturbed one, what cannot be learned stops it."""

from __future__ import annotations

import errno
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from realign.model.bagel import Bagel
from tests.train.rga_runs import (
    FULL,
    assert_same_weights,
    build_recipe,
    find_launcher,
    read_log,
    read_weights,
    start,
    write_recipe,
)
from train import state
from train.journal import load_rows
from train.ranks import Ranks
from train.recipe import Recipe
from train.rga import Aligner, Stopped, main, run
from train.rollouts import score
from train.state import load_state

MINI = {"start": "mini", "rollout": {"height": 64, "width": 64, "group": 8}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["redness", "blueness"])
def test_the_reward_rises(tmp_path: Path, name: str) -> None:
    """Whichever way it points: of the same noise, before and after, by more than three times the spread."""
    changes = {"reward": f"function:tests.train.rewards:{name}", "update": {"learning_rate": 3e-3}}
    aligner = Aligner(build_recipe(tmp_path, MINI, changes), Ranks())
    before = aligner.iterate()
    for _ in range(4):
        aligner.iterate()
    again = score(aligner.reward, aligner.roller.roll(0, range(16))).mean()
    assert float(again) - before["reward"] > 3 * before["spread"]


@pytest.mark.parametrize("policy", ["full", "lora"])
def test_a_run_in_pieces_is_the_whole_run(tmp_path: Path, policy: str) -> None:
    changes = {"policy": {"kind": policy, "rank": 2, "alpha": 4.0}}
    run(build_recipe(tmp_path, FULL, changes, {"iterations": 3}), tmp_path / "whole", Ranks())
    for iterations in (1, 3):
        recipe = build_recipe(tmp_path, FULL, changes, {"iterations": iterations})
        run(recipe, tmp_path / "pieces", Ranks())
    assert_same_weights(tmp_path / "whole", tmp_path / "pieces")
    rows = read_log(tmp_path / "pieces")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["first_ratio_error"] == 0
        assert row["ratio_min"] < 1 < row["ratio_max"], "the second update is not of the rollout's weights"
        assert row["distinct_chains"] == row["failures"] == 1.0
        assert 0 <= row["degenerate"] <= 1
        assert row["grad_norm"] > 0
        assert row["seconds"].keys() == {"rollout", "reward", "reference", "update"}
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert rows[-1]["kl"] > rows[0]["kl"] > 0


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    """kill -9 twice, wherever it was."""
    path = write_recipe(tmp_path / "recipe.toml", FULL, {"iterations": 4})
    run(build_recipe(tmp_path, FULL, {"iterations": 4}), tmp_path / "whole", Ranks())
    for _ in range(2):
        process = start(path, tmp_path / "killed", stdout=subprocess.DEVNULL)
        wait_for_a_new_checkpoint(tmp_path / "killed", process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "model").exists(), "it was not killed in time"
    assert start(path, tmp_path / "killed", stdout=subprocess.DEVNULL).wait(timeout=600) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    assert [row["step"] for row in read_log(tmp_path / "killed")] == [1, 2, 3, 4]


def wait_for_a_new_checkpoint(out: Path, process: subprocess.Popen) -> None:
    before = set((out / "checkpoints").glob("step-*"))
    while process.poll() is None and not set((out / "checkpoints").glob("step-*")) - before:
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, name: str, capsys) -> None:
    recipe = build_recipe(tmp_path, {"iterations": 3})
    run(recipe, tmp_path / "whole", Ranks())
    run(recipe, tmp_path / "torn", Ranks())
    newest = sorted((tmp_path / "torn" / "checkpoints").glob("step-*"))[-1] / name
    newest.write_bytes(newest.read_bytes()[:-10])
    run(recipe, tmp_path / "torn", Ranks())
    assert "cannot be read" in capsys.readouterr().out
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.parametrize("written", ["nothing", "half"])
def test_a_full_disk_stops_the_run_in_one_line_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    path = write_recipe(tmp_path / "recipe.toml", {"iterations": 3})
    run(Recipe.load(path), tmp_path / "whole", Ranks())
    save = state.save_file

    def fail(tensors, file) -> None:
        if "00000002" in str(file):
            if written == "half":
                file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file)

    monkeypatch.setattr(state, "save_file", fail)
    monkeypatch.setattr(sys, "argv", ["rga", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"])
    with pytest.raises(SystemExit, match="No space left") as caught:
        main()
    assert len(str(caught.value.code).splitlines()) == 1
    assert [p.name for p in (tmp_path / "out" / "checkpoints").glob("step-*")] == ["step-00000001"]
    monkeypatch.setattr(state, "save_file", save)
    main()
    assert_same_weights(tmp_path / "whole", tmp_path / "out")
    assert not list((tmp_path / "out" / "checkpoints").glob(".tmp*"))
    assert [row["step"] for row in read_log(tmp_path / "out")] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "group"), [(2, 3), (3, 4)])
def test_several_processes_give_the_weights_of_one(tmp_path: Path, processes: int, group: int) -> None:
    """Groups span them and do not divide by them; up to rounding: sums over entries are taken in another
    order.
    """
    evaluated = {"evaluation": {"every": 2, "num_prompts": 3, "temperature": 1.0}}
    path = write_recipe(tmp_path / "recipe.toml", FULL, evaluated, {"rollout": {"group": group}})
    run(Recipe.load(path), tmp_path / "one", Ranks())
    process = start(path, tmp_path / "two", find_launcher(processes), stdout=subprocess.DEVNULL)
    assert process.wait(timeout=600) == 0
    one, two = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-5, msg=name)
    for first, second in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert second["first_ratio_error"] == 0
        for name in ("reward", "spread", "ratio_mean", "grad_norm", "distinct_chains"):
            assert second[name] == pytest.approx(first[name], rel=1e-3), name
    first, second = (load_rows(tmp_path / name / "evaluations.jsonl") for name in ("one", "two"))
    assert [row["step"] for row in second] == [row["step"] for row in first] == [0, 2]
    assert second[0]["reward"] == first[0]["reward"], "the weights are the same, and so are all samples"
    assert second[1]["reward"] == pytest.approx(first[1]["reward"], rel=1e-3)
    shown = {p.relative_to(tmp_path / "one") for p in (tmp_path / "one" / "evaluations").rglob("*.png")}
    assert shown == {
        p.relative_to(tmp_path / "two") for p in (tmp_path / "two" / "evaluations").rglob("*.png")
    }


def test_a_checkpoint_holds_masters_moments_and_the_average(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, {"update": {"ema_decay": 0.9}})
    run(recipe, tmp_path / "out", Ranks())
    tensors, numbers = load_state(tmp_path / "out" / "checkpoints")
    assert (numbers["step"], numbers["updates"]) == (2, 2)
    name = "decoder.layers.0.gen.qkv_proj.weight"
    kinds = {key.removesuffix(f".{name}") for key in tensors if key.endswith(name)}
    assert kinds == {
        "master", "average", "optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step",
    }  # fmt: skip
    exported = Bagel.from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(exported.get_parameter(name), tensors[f"average.{name}"])
    assert not torch.equal(tensors[f"master.{name}"], tensors[f"average.{name}"])


def test_nothing_but_the_generation_expert_changes(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path)
    before = {k: v.clone() for k, v in Bagel.from_pretrained(recipe.start).state_dict().items()}
    aligner = Aligner(recipe, Ranks())
    aligner.iterate()
    for name, tensor in aligner.engine.model.state_dict().items():
        is_changed = not torch.equal(tensor, before[name])
        assert is_changed == (name.startswith("decoder.") and ".gen." in name), name


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    run(build_recipe(tmp_path, {"iterations": 1}), tmp_path / "out", Ranks())
    other = build_recipe(tmp_path, {"iterations": 1, "seed": 1})
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        run(other, tmp_path / "out", Ranks())


def test_prompts_that_were_changed_meanwhile_are_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na ring\n")
    recipe = build_recipe(tmp_path, {"iterations": 1, "data": {"tasks": [], "prompts": str(prompts)}})
    run(recipe, tmp_path / "out", Ranks())
    run(recipe, tmp_path / "out", Ranks())
    prompts.write_text("a star\na cross\n")
    with pytest.raises(ValueError, match=r"prompts\.txt has changed since the run in .* was begun"):
        run(recipe, tmp_path / "out", Ranks())


def test_a_run_may_go_on_in_less_memory(tmp_path: Path) -> None:
    """With packs of other sizes, and layers that are computed again; in float32 with the same weights, but
    for rounding.
    """
    run(build_recipe(tmp_path), tmp_path / "whole", Ranks())
    run(build_recipe(tmp_path, {"iterations": 1}), tmp_path / "out", Ranks())
    update = {"packing": "dense", "micro_batch": 2}
    less = {"rollout": {"batch_size": 2}, "policy": {"checkpointing": True}, "update": update}
    run(build_recipe(tmp_path, less), tmp_path / "out", Ranks())
    whole, out = read_weights(tmp_path / "whole"), read_weights(tmp_path / "out")
    for name in whole:
        torch.testing.assert_close(out[name], whole[name], rtol=1e-4, atol=2e-5, msg=name)


def test_a_replay_by_other_weights_stops_the_run(tmp_path: Path) -> None:
    aligner = Aligner(build_recipe(tmp_path), Ranks())
    roll = aligner.roller.roll

    def roll_and_change(*given):
        made = roll(*given)
        name = "decoder.layers.1.gen.down_proj.weight"
        aligner.engine.publish({name: 1.01 * aligner.engine.model.get_parameter(name).detach()})
        return made

    aligner.roller.roll = roll_and_change
    with pytest.raises(Stopped, match="first ratio of iteration 1 is off one by"):
        aligner.iterate()


def test_a_denser_packing_is_held_to_a_tenth_of_the_clip_range(tmp_path: Path) -> None:
    aligner = Aligner(build_recipe(tmp_path, {"update": {"packing": "dense", "micro_batch": 5}}), Ranks())
    assert aligner.iterate()["first_ratio_error"] <= 0.02


@pytest.mark.parametrize(
    ("reward", "message"),
    [("constant", "were equal for 2 iterations"), ("broken", "the score is nan")],
)
def test_a_reward_that_teaches_nothing_stops_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reward: str, message: str
) -> None:
    changes = {"reward": f"function:tests.train.rewards:{reward}", "guards": {"patience": 2}}
    path = write_recipe(tmp_path / "recipe.toml", changes, {"iterations": 9})
    monkeypatch.setattr(sys, "argv", ["rga", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"])
    with pytest.raises(SystemExit, match=message) as caught:
        main()
    assert str(caught.value.code).startswith("stopped: ")
    assert len(str(caught.value.code).splitlines()) == 1


def test_the_count_before_a_collapse_outlasts_a_restart(tmp_path: Path) -> None:
    changes = {"reward": "function:tests.train.rewards:constant", "guards": {"patience": 2}}
    run(build_recipe(tmp_path, changes, {"iterations": 1}), tmp_path / "out", Ranks())
    with pytest.raises(Stopped, match="for 2 iterations"):
        run(build_recipe(tmp_path, changes, {"iterations": 9}), tmp_path / "out", Ranks())


def test_bfloat16_keeps_float32_masters(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, {"dtype": "bfloat16", "guards": {"ratio": 0.05}})
    aligner = Aligner(recipe, Ranks())
    row = aligner.iterate()
    assert row["grad_norm"] > 0
    assert aligner.engine.model.dtype == torch.bfloat16
    assert {p.dtype for p in aligner.policy.masters.values()} == {torch.float32}


def test_several_rewards_are_told_apart(tmp_path: Path) -> None:
    reward = "function:tests.train.rewards:brightness*2+function:tests.train.rewards:constant"
    row = Aligner(build_recipe(tmp_path, {"reward": reward}), Ranks()).iterate()
    assert row["rewards"]["function:tests.train.rewards:constant"] == 0.5
    parts = row["rewards"]
    first = parts["function:tests.train.rewards:brightness"]
    assert row["reward"] == pytest.approx(2 * first + 0.5, rel=1e-5)


def test_an_average_of_nothing_is_the_last_weights(tmp_path: Path) -> None:
    run(build_recipe(tmp_path, {"iterations": 1}), tmp_path / "out", Ranks())
    tensors, _ = load_state(tmp_path / "out" / "checkpoints")
    exported = Bagel.from_pretrained(tmp_path / "out" / "model")
    masters = {n.removeprefix("master."): t for n, t in tensors.items() if n.startswith("master.")}
    assert masters
    assert not [name for name in tensors if name.startswith("average.")]
    assert all(torch.equal(exported.get_parameter(name), master) for name, master in masters.items())
