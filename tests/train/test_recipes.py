"""Recipes: all that are shipped load, those of BAGEL-7B run, a command line changes them or says why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from realign.model.bagel import Bagel
from tests.train.rga_runs import ROOT, read_log, save_small, start, write_recipe
from train.command import build_parser, load_recipe
from train.recipe import Recipe, change_table
from train.rga import main

RECIPES = sorted((ROOT / "train" / "recipes").glob("*rga*.toml"))
LARGE = [path for path in RECIPES if path.stem.startswith("bagel-7b")]
# Sizes that a test can afford; what makes the recipe is left as it is.
SMALL = (
    "rollout.prompts=2 rollout.group=2 rollout.height=32 rollout.width=32 rollout.max_tokens=8 scale.zero=0 "
    "policy.rank=2 iterations=1 reward=function:tests.train.rewards:brightness"
)


def load(path: Path, *arguments: str) -> Recipe:
    return load_recipe(build_parser(None).parse_args([str(path), "--out", "out", *arguments]))


def write_prompts(folder: Path) -> Path:
    """One with a reference picture, and one without."""
    Image.new("RGB", (32, 32), "red").save(folder / "mug.png")
    parts = [[{"image": "mug.png"}, {"text": "the object of image 1 on a table"}], [{"text": "a lamp"}]]
    lines = [json.dumps({"id": f"p{number}", "prompt": prompt}) for number, prompt in enumerate(parts)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder / "prompts.jsonl"


def test_there_are_recipes_of_bagel_7b() -> None:
    assert len(LARGE) == 3


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_recipes(path: Path) -> None:
    assert Recipe.load(path).iterations > 0


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_recipes_of_bagel_7b_avoid_what_went_wrong_for_others(path: Path) -> None:
    """No guidance, velocities held to the start's, noise in the first half, small clips, replays of the
    rollout's rows in bfloat16.
    """
    recipe = Recipe.load(path)
    assert recipe.rollout.text_scale == 1.0
    assert recipe.update.kl_beta > 0
    assert recipe.update.kl_space == "velocity"
    assert recipe.window.end <= recipe.rollout.num_steps / 2
    assert max(recipe.update.clip_low, recipe.update.clip_high) <= 1e-4
    assert recipe.update.packing == "rollout"
    assert recipe.rollout.batch_size is not None
    assert recipe.policy.checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_recipes_of_bagel_7b_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """With a tiny checkpoint of the same layout: an iteration, and weights that can be loaded."""
    out, begin = tmp_path / "out", save_small(tmp_path / "start")
    given = ["--start", begin, "--prompts", write_prompts(tmp_path), "--out", out, "--device", "cpu"]
    arguments = ["rga", path, *given, "--set", *SMALL.split()]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    main()
    (row,) = read_log(out)
    assert row["grad_norm"] > 0
    assert row["kl"] >= 0
    (checkpoint,) = (out / "checkpoints").glob("step-*")
    tensors = load_file(checkpoint / "state.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(tensor.any() for name, tensor in tensors.items() if name.startswith("optimizer.exp_avg."))
    aligned, before = (Bagel.from_pretrained(f, "cpu", torch.bfloat16) for f in (out / "model", begin))
    for name, parameter in aligned.named_parameters():
        assert ".gen." in name or torch.equal(parameter, before.get_parameter(name)), name


def test_a_command_line_changes_a_recipe(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.toml")
    changes = ["rollout.prompts=3", "update.learning_rate=1e-5", "window.rule=flow-grpo", "seed=7"]
    recipe = load(
        path, "--set", *changes, "--set", "scale.zero=2", "--start", "some/BAGEL", "--iterations", "9"
    )
    assert (recipe.rollout.prompts, recipe.update.learning_rate) == (3, 1e-5)
    assert (recipe.window.rule, recipe.seed, recipe.scale.zero) == ("flow-grpo", 7, 2)
    assert (recipe.start, recipe.iterations) == ("some/BAGEL", 9)
    assert recipe.data.tasks
    assert recipe.rollout.group == Recipe.load(path).rollout.group


def test_prompts_take_the_place_of_tasks(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path / "recipe.toml"), "--prompts", 'the "best".jsonl')
    assert (recipe.data.prompts, recipe.data.tasks) == ('the "best".jsonl', ())
    assert (
        load(tmp_path / "recipe.toml", "--prompts", "\U0001f600 ü.jsonl").data.prompts == "\U0001f600 ü.jsonl"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rollout.prompts", "no change: must be NAME=VALUE"),
        ("=3", "no change"),
        ("rollout.=3", "no change"),
        ("a.b.c=3", "no change"),
        ("reward.x=3", "reward is no table"),
        ("speed=3", "recipe has 'speed'"),
        ("update.speed=3", "update has 'speed'"),
        ("rollout.prompts=many", "prompts is 'many': must be a whole number"),
        ("scale.zero=7", "scale zero is 7"),
    ],
)
def test_a_change_of_no_use_is_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(write_recipe(tmp_path / "recipe.toml"), "--set", change)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_toml_is_text() -> None:
    table: dict = {}
    for change in ("start=/a b/c=d", 'reward="clip:x"', "scale.zero = 3"):
        change_table(table, change)
    assert table == {"start": "/a b/c=d", "reward": "clip:x", "scale": {"zero": 3}}


def test_a_bad_change_is_one_line(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.toml", {"scale": {"zero": 1}})
    process = start(path, tmp_path / "out", stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert "start it with torchrun or deepspeed" in errors
    assert not (tmp_path / "out").exists()
