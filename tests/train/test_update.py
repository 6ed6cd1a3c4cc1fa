"""Updates: the mean is over all entries however they are packed; the pull to the reference; recipes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from realign.rewards.spec import build_reward
from tests.train.rga_runs import BASE, SMALL_PICTURES, build_recipe, start, write_recipe
from train import ranks
from train.ranks import Ranks
from train.recipe import Recipe
from train.replay import Replayer
from train.rga import Aligner
from train.update import Stopped, UpdateOptions


def find_gradients(folder: Path, *changes: dict) -> dict[str, Tensor]:
    """The masters' gradients of a first update, not clipped."""
    aligner = Aligner(build_recipe(folder, *changes), Ranks())
    found: dict[str, Tensor] = {}

    def keep() -> float:
        found.update({name: master.grad.clone() for name, master in aligner.policy.masters.items()})
        return 1.0

    aligner.updater._step = keep
    aligner.iterate()
    return found


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, grad in expected.items():
        atol = tolerance * float(grad.abs().max())
        torch.testing.assert_close(ours[name], grad, rtol=tolerance, atol=atol, msg=name)


def test_the_mean_does_not_depend_on_the_packing(tmp_path: Path) -> None:
    """Packs of other sizes, the last one smaller, batches of the sampler: up to the order of sums."""
    whole = find_gradients(tmp_path)
    assert all(grad.any() for grad in whole.values())
    for packing in (
        {"update": {"packing": "dense", "micro_batch": 5}},
        {"update": {"packing": "dense", "micro_batch": 1}},
        {"rollout": {"batch_size": 4}},
        {"policy": {"checkpointing": True}},
    ):
        assert_close(find_gradients(tmp_path, packing), whole, 1e-4)


def test_the_gradient_may_flow_through_contexts(tmp_path: Path) -> None:
    """Of references, which the generation expert reads: another one then, however the entries are packed."""
    references = {"start": SMALL_PICTURES, "data": {"tasks": ["in_context"]}, "iterations": 1}
    through = {"update": {"through_contexts": True}}
    cut = find_gradients(tmp_path, references)
    whole = find_gradients(tmp_path, references, through)
    name = "decoder.layers.0.gen.qkv_proj.weight"
    assert float((whole[name] - cut[name]).norm()) > 1e-3 * float(cut[name].norm())
    dense = {"update": {"packing": "dense", "micro_batch": 5, **through["update"]}}
    for packing in (dense, {"policy": {"checkpointing": True}, **through}):
        assert_close(find_gradients(tmp_path, references, packing), whole, 1e-4)


def test_a_pull_to_the_reference(tmp_path: Path) -> None:
    """None where training begins; then it holds the weights back, in either space."""
    beta = {"update": {"kl_beta": 1e4, "learning_rate": 1e-4}}
    free = {"update": {"kl_beta": 1e-12, "learning_rate": 1e-4}}
    for space in ("velocity", "mean"):
        rows = {}
        for name, change in (("held", beta), ("free", free)):
            aligner = Aligner(build_recipe(tmp_path, change, {"update": {"kl_space": space}}), Ranks())
            rows[name] = [aligner.iterate()["kl"] for _ in range(4)]
        assert rows["held"][0] == rows["free"][0] == 0
        assert 0 < rows["held"][-1] < rows["free"][-1]


def test_advantages_reach_their_own_samples(tmp_path: Path) -> None:
    """Of the second part too: parts that are given each other's would go elsewhere."""
    parts: list[list[float]] = []
    aligner = Aligner(build_recipe(tmp_path, {"update": {"updates": 2}}), Ranks())
    update = aligner.updater.update

    def watch(entries, advantages, *others):
        parts.append([advantages[entry.number] for entry in entries if entry.noisy is first_step(entry)])
        levels = [
            np.asarray(entry.sample.image).mean() for entry in entries if entry.noisy is first_step(entry)
        ]
        assert np.argsort(levels).tolist() == np.argsort(parts[-1]).tolist()
        return update(entries, advantages, *others)

    aligner.updater.update = watch
    aligner.iterate()
    assert [len(part) for part in parts] == [3, 3]
    assert all(sum(part) == pytest.approx(0, abs=1e-3) for part in parts)


def first_step(entry):
    return entry.sample.trajectory.recording.noisy_steps[0]


def test_without_a_gradient_nothing_changes(tmp_path: Path) -> None:
    """Neither by the moments of updates before, nor by weight decay."""
    aligner = Aligner(build_recipe(tmp_path, {"update": {"weight_decay": 0.1}}), Ranks())
    aligner.iterate()
    before = {name: master.detach().clone() for name, master in aligner.policy.masters.items()}
    aligner.reward = build_reward("function:tests.train.rewards:constant")
    row = aligner.iterate()
    assert (row["grad_norm"], row["degenerate"], row["spread"]) == (0.0, 1.0, 0.0)
    assert all(torch.equal(before[name], master) for name, master in aligner.policy.masters.items())
    assert aligner.updater.replayer.held[1] == [], "contexts of samples that are gone"


def test_packs_that_teach_nothing_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And count in the mean all the same."""
    reward = {"reward": "function:tests.train.rewards:second_group"}
    whole = find_gradients(tmp_path, reward)
    replayed = []
    replay = Replayer.replay

    def watch(self, entries):
        replayed.extend(entry.sample.request.id for entry in entries)
        return replay(self, entries)

    monkeypatch.setattr(Replayer, "replay", watch)
    dense = {"update": {"packing": "dense", "micro_batch": 6}}
    assert_close(find_gradients(tmp_path, reward, dense), whole, 1e-4)
    assert replayed == [f"0/{number}" for number in (3, 3, 4, 4, 5, 5)]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    aligner = Aligner(build_recipe(tmp_path), Ranks())
    before = {name: master.detach().clone() for name, master in aligner.policy.masters.items()}
    first = next(iter(aligner.policy.masters.values()))
    first.grad = torch.full_like(first, float("nan"))
    with pytest.raises(Stopped, match="norm is nan"):
        aligner.iterate()
    assert all(torch.equal(before[name], master) for name, master in aligner.policy.masters.items())


def test_rates() -> None:
    options = UpdateOptions(learning_rate=1.0, warmup=4, ema_decay=0.9)
    assert [options.rate(n) for n in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert options.average(0) == 0.1
    assert options.average(1000) == 0.9
    assert UpdateOptions().average(1000) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"iterations": 0}, "iterations is 0"),
        ({"reward": "beauty"}, "'beauty' is not known"),
        ({"speed": 3}, "recipe has 'speed'"),
        ({"update": {"speed": 3}}, "update has 'speed'"),
        ({"iterations": "many"}, "iterations is 'many': must be a whole number"),
        ({"rollout": {"group": 2.5}}, "rollout group is 2.5"),
        ({"rollout": {"shared_chain": 1}}, "shared_chain is 1: must be true or false"),
        ({"update": {"updates": True}}, "updates is True"),
        ({"update": {"betas": 0.9}}, "betas is 0.9: must be two numbers"),
        ({"update": {"betas": [0.9]}}, r"betas is \[0.9\]: must be two numbers"),
        ({"update": {"betas": [0.9, 1.0]}}, r"betas is \[0.9, 1.0\]: both must be from 0 to below 1"),
        ({"rollout": {"interval": ["a", "b"]}}, r"interval is \['a', 'b'\]: must be two numbers"),
        ({"data": {"tasks": ["t2i", 3]}}, r"tasks is \['t2i', 3\]: must be a list of texts"),
        ({"seed": -1}, "seed is -1: must be 0 or more"),
        ({"guards": {"patience": 0}}, "guards patience is 0: must be at least 1"),
        ({"guards": {"spread": -1.0}}, "guards spread is -1.0"),
        ({"guards": {"ratio": -1.0}}, "guards ratio is -1.0"),
        ({"update": {"clip_low": 1.5}}, "clip_low is 1.5: must be at most 1"),
        ({"update": {"warmup": -1}}, "warmup is -1: must be 0 or more"),
        ({"update": {"weight_decay": -0.1}}, "weight_decay is -0.1"),
        ({"advantage": {"std": "some"}}, "rule.std is 'some'"),
        ({"guards": 3}, "guards is 3: must be a table"),
        ({"advantage": 3}, "advantage is 3: must be a table"),
        ({"update": {"packing": "loose"}}, "packing is 'loose'"),
        ({"update": {"kl_space": "outer"}}, "kl_space is 'outer'"),
        ({"update": {"updates": 7}}, "6 samples to share"),
        ({"update": {"learning_rate": 0}}, "learning_rate is 0"),
        ({"update": {"clip_low": 0}}, "clip_low is 0"),
        ({"update": {"ema_decay": 1.0}}, "ema_decay 1.0"),
        ({"window": {"size": 9}}, "window of 9 steps"),
        ({"policy": {"kind": "some"}}, "kind is 'some'"),
        ({"data": {"prompts": "x"}}, "give one of them"),
    ],
)
def test_a_recipe_of_no_use_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_recipe(tmp_path / "recipe.toml", changes)
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.load(path)
    assert "is not a recipe" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_recipe_without_a_start_is_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.toml")
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "start" not in line))
    with pytest.raises(ValueError, match="recipe has no 'start': give it"):
        Recipe.load(path)


def test_a_recipe_keeps_what_it_says(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, {"advantage": {"std": "global"}, "guards": {"patience": 9}})
    assert (recipe.advantage.std, recipe.advantage.clamp, recipe.guards.patience) == ("global", 5.0, 9)
    assert recipe.rollout.group == BASE["rollout"]["group"]


def test_a_bad_command_is_one_line(tmp_path: Path) -> None:
    process = start(tmp_path / "missing.toml", tmp_path / "out", stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert "is not a recipe" in errors


@pytest.mark.parametrize("device", ["abacus", "meta:x", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device is '{device}'") as caught:
        Ranks.join(device)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_each_process_of_a_launcher_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(ranks, "_check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Ranks.join(device).device == "cuda:3"
    assert Ranks.join("cuda:1").device == "cuda:1"
