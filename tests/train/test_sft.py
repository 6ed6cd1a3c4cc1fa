"""The supervised trainer: it learns, resumes exactly, and gives the same on one process and on two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from realign.data.packing import Packer
from realign.model.bagel import Bagel
from tests.train.conftest import RECIPE
from tests.train.rga_runs import find_launcher
from train.sft import Optimization, Ranks, Recipe, Trainer, build_pool, run
from train.state import load_state, save_state
from train.world_data import WorldData

ROOT = Path(__file__).parents[2]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "ema.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def start_training(recipe: Path, out: Path, *launcher: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *(launcher or ()), *(("-m",) if launcher else ()), "train.sft"]
    return subprocess.Popen(
        [*command, str(recipe), "--out", str(out)], env=environment, stdout=subprocess.DEVNULL, cwd=ROOT
    )


def finish(process: subprocess.Popen) -> None:
    """Waits for it to end well; the time is for a machine that is busy with other work."""
    try:
        assert process.wait(timeout=600) == 0
    finally:
        process.kill()


def test_the_losses_fall(write_recipe, tmp_path: Path) -> None:
    run(Recipe.load(write_recipe(steps=40)), tmp_path / "out", Ranks())
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert rows[-1]["ce"] < 0.7 * rows[0]["ce"]
    assert rows[-1]["mse"] < rows[0]["mse"]
    assert all(row["samples_per_second"] > 0 for row in rows)


def test_a_killed_run_ends_with_the_same_weights(write_recipe, tmp_path: Path) -> None:
    """kill -9 twice, at whatever step it had reached."""
    recipe = write_recipe(steps=8)
    run(Recipe.load(recipe), tmp_path / "whole", Ranks())
    for _ in range(2):
        process = start_training(recipe, tmp_path / "killed")
        wait_for_a_new_checkpoint(tmp_path / "killed", process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finish(start_training(recipe, tmp_path / "killed"))
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    rows = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)), "each step once, also those that were repeated"


def wait_for_a_new_checkpoint(out: Path, process: subprocess.Popen) -> None:
    before = set((out / "checkpoints").glob("step-*"))
    while process.poll() is None and not set((out / "checkpoints").glob("step-*")) - before:
        time.sleep(0.02)


def test_two_processes_give_the_weights_of_one(write_recipe, tmp_path: Path) -> None:
    """Up to rounding: sums over samples are taken in another order."""
    recipe = write_recipe(steps=3)
    run(Recipe.load(recipe), tmp_path / "one", Ranks())
    launcher = find_launcher(2)[:-1]
    finish(start_training(recipe, tmp_path / "two", *launcher))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-5, msg=name)


def test_a_torn_checkpoint_is_passed_over(write_recipe, tmp_path: Path) -> None:
    recipe = Recipe.load(write_recipe(steps=6))
    run(recipe, tmp_path / "whole", Ranks())
    run(recipe, tmp_path / "torn", Ranks())
    newest = sorted((tmp_path / "torn" / "checkpoints").glob("step-*"))[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    run(recipe, tmp_path / "torn", Ranks())
    assert_same_weights(tmp_path / "whole", tmp_path / "torn")


def test_the_export_loads_and_is_the_average(write_recipe, tmp_path: Path) -> None:
    run(Recipe.load(write_recipe(steps=2)), tmp_path / "out", Ranks())
    model = Bagel.from_pretrained(tmp_path / "out" / "model")
    tensors, numbers = load_state(tmp_path / "out" / "checkpoints")
    assert numbers["step"] == 2
    name = "decoder.layers.0.gen.qkv_proj.weight"
    assert torch.equal(model.get_parameter(name), tensors[f"average.{name}"])
    assert not torch.equal(model.get_parameter(name), tensors[f"model.{name}"])


def test_bfloat16_keeps_float32_masters(write_recipe, tmp_path: Path) -> None:
    recipe = Recipe.load(write_recipe(steps=1, precision="bfloat16"))
    model = Bagel.from_pretrained(recipe.start).train()
    data = WorldData(model, recipe.mixture, build_pool(model, recipe, tmp_path, Ranks()), recipe.seed)
    trainer = Trainer(model, recipe, Ranks())
    packer = Packer(model.tokenizer, model.config.vit.patch_dim, model.config.latent_dim)
    numbers = trainer.step(packer.pack(data.step_samples(0, 0, 1)))
    assert numbers["grad_norm"] > 0
    assert {p.dtype for p in trainer.parameters} == {torch.float32}
    assert {p.dtype for p in trainer.average} == {torch.float32}


def test_a_run_of_another_recipe_is_refused(write_recipe, tmp_path: Path) -> None:
    run(Recipe.load(write_recipe(steps=2)), tmp_path / "out", Ranks())
    other = write_recipe(steps=2, precision="bfloat16")
    with pytest.raises(ValueError, match="precision was float32, is bfloat16"):
        run(Recipe.load(other), tmp_path / "out", Ranks())


def test_a_run_can_be_prolonged_before_its_decay_only(write_recipe, tmp_path: Path) -> None:
    run(Recipe.load(write_recipe(steps=6)), tmp_path / "out", Ranks())
    with pytest.raises(ValueError, match="optimization was"):
        run(Recipe.load(write_recipe(steps=20)), tmp_path / "out", Ranks())
    checkpoints = tmp_path / "out" / "checkpoints"
    tensors, numbers = load_state(checkpoints)
    del numbers["step"]
    save_state(tmp_path / "early" / "checkpoints", 2, tensors, numbers)
    run(Recipe.load(write_recipe(steps=7)), tmp_path / "early", Ranks())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("start = ", "not a recipe"),
        ('start = "x"', "optimization"),
        ("speed = 3\n[optimization]", "steps"),
        (RECIPE.format(start="x", steps=3, precision="int8"), "precision is 'int8'"),
        (
            RECIPE.format(start="x", steps=3, precision="float32").replace("edit/none", "edit/never"),
            "mixture counts edit/never",
        ),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.load(path)


def test_the_rate_warms_up_stays_and_decays() -> None:
    o = Optimization(steps=100, learning_rate=1.0, warmup_steps=10, decay_fraction=0.4)
    assert o.rate(0) == pytest.approx(0.1)
    assert o.rate(10) == o.rate(59) == 1.0
    assert o.rate(80) == pytest.approx(0.5)
    assert o.rate(99) == pytest.approx(1 / 40)
