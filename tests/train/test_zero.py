"""DeepSpeed's ZeRO: processes that share float32 tensors change them as one that has everything."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.train.rga_runs import FULL, ROOT, find_launcher, read_log, read_weights, write_recipe
from tests.train.zero_job import WAYS, build, collect, take_steps
from train.ranks import Ranks
from train.recipe import Recipe
from train.rga import run
from train.state import load_state
from train.zero import ScaleOptions

LORA = {"policy": {"kind": "lora", "rank": 2, "alpha": 4.0}}


def run_recipe(folder: Path, name: str, *changes: dict) -> None:
    run(Recipe.load(write_recipe(folder / "recipe.toml", *changes)), folder / name, Ranks())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave in every way to share, and what one leaves that has everything."""
    folder = tmp_path_factory.mktemp("zero")
    toy, optimizer = build(ScaleOptions(), Ranks())
    norms = take_steps(toy, optimizer, range(2), (0, 1))
    save_file({k: v.detach().clone() for k, v in optimizer.tensors().items()}, folder / "start.safetensors")
    norms += take_steps(toy, optimizer, range(2, 4), (0, 1))
    found = collect(toy, optimizer, norms)
    save_file({k: v.detach().clone() for k, v in found.items()}, folder / "one.safetensors")
    for kind, change in (("full", {}), ("lora", LORA)):
        run_recipe(folder, f"one-{kind}", FULL, change, {"iterations": 3})
    run_recipe(folder, "full-zero3", FULL, {"iterations": 1})  # which two processes go on with
    (folder / "recipes").mkdir()
    full = {**FULL, "start": str(folder / "start")}
    write_recipe(folder / "recipes" / "full-zero3.toml", full, {"scale": {"zero": 3}})
    lora = {"scale": {"zero": 2, "offload": True}, "iterations": 3}
    write_recipe(folder / "recipes" / "lora-zero2.toml", full, LORA, lora)
    bf16 = {"dtype": "bfloat16", "guards": {"ratio": 0.05}, "scale": {"zero": 3}, "iterations": 1}
    write_recipe(folder / "recipes" / "bf16-zero3.toml", full, bf16)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *find_launcher(2), "tests.train.zero_job", str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to rounding: sums over processes and of squares are taken in another order."""
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_plain_way(shared: Path, way: str) -> None:
    """Values, moments, average and norms, with a tensor, a group and a step that have no gradient, one that
    is clipped, and processes that have different numbers of packs; from the beginning, and from a checkpoint
    that one process wrote.
    """
    expected = load_file(shared / "one.safetensors")
    assert expected["norms"][2] == 0
    assert expected["norms"][3] > 1, "nothing was clipped"
    first, second = (load_file(shared / f"{way}-{rank}.safetensors") for rank in (0, 1))
    assert_close({k: v for k, v in first.items() if k in expected}, expected)
    again = {k.removeprefix("again."): v for k, v in first.items() if k.startswith("again.")}
    assert_close({**again, "norms": expected["norms"]}, expected)
    torch.testing.assert_close(again["norms"], expected["norms"][2:], rtol=1e-5, atol=1e-6)
    assert not [key for key in second if key.startswith("master.")], "one checkpoint is enough"
    for name in expected:
        if name.startswith(("read.", "averages.")):
            assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_not_finite_changes_nothing(shared: Path, way: str) -> None:
    """And its norm says so in every process, though one alone has it."""
    for rank in (0, 1):
        found = load_file(shared / f"{way}-{rank}.safetensors")
        assert not found["infinite.norm"].isfinite()
        assert found["infinite.changed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_it_is_really_shared(shared: Path, way: str) -> None:
    """Two moments and the average, of half of the numbers each, and what evens the halves."""
    for rank in (0, 1):
        found = load_file(shared / f"{way}-{rank}.safetensors")
        whole = int(found["whole"])
        assert int(found["moments"]) < 0.75 * 3 * whole
        assert int(found["masters"]) == (0 if way.startswith("zero3") else whole)


@pytest.mark.slow
def test_a_run_goes_on_shared_and_then_whole(shared: Path) -> None:
    """An iteration of one process, one of two with ZeRO-3, one of one again."""
    run_recipe(shared, "full-zero3", FULL, {"iterations": 3})
    assert_same_run(shared / "full-zero3", shared / "one-full")


@pytest.mark.slow
def test_adapters_are_shared(shared: Path) -> None:
    assert_same_run(shared / "lora-zero2", shared / "one-lora")


@pytest.mark.slow
def test_masters_of_a_bfloat16_engine_are_float32(shared: Path) -> None:
    tensors, _ = load_state(shared / "bf16-zero3" / "checkpoints")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    moved = [name for name, t in tensors.items() if name.startswith("optimizer.exp_avg.") and t.any()]
    assert len(moved) == sum(name.startswith("master.") for name in tensors)


def assert_same_run(ours: Path, expected: Path) -> None:
    found, weights = read_weights(ours), read_weights(expected)
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)
    for row, wanted in zip(read_log(ours), read_log(expected), strict=True):
        assert row["first_ratio_error"] == 0
        for name in ("reward", "ratio_mean", "grad_norm", "kl"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"zero": 4}, "scale zero is 4"),
        ({"offload": True}, "offload is true: that is ZeRO's, and zero is 0"),
        ({"options": "zero.json"}, "options is 'zero.json': that is ZeRO's"),
        ({"zero": 2, "options": "missing.json"}, "cannot be read"),
        ({"zero": True}, "zero is True: must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, table: dict, message: str) -> None:
    path = write_recipe(tmp_path / "recipe.toml", {"scale": table})
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_options_are_those_of_zero(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text('{"reduce_bucket_size": 1000}')
    assert ScaleOptions(2, options=str(tmp_path / "zero.json")).read() == {"reduce_bucket_size": 1000}
    (tmp_path / "zero.json").write_text('{"stage": 1}')
    with pytest.raises(ValueError, match="without offload_optimizer, offload_param, stage"):
        ScaleOptions(2, options=str(tmp_path / "zero.json"))


def test_one_process_alone_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = Recipe.load(write_recipe(tmp_path / "recipe.toml", {"scale": {"zero": 1}}))
    with pytest.raises(ValueError, match="started alone; start it with torchrun or deepspeed"):
        recipe.check_spread(Ranks())


def test_without_deepspeed_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "realign\[deepspeed\]"') as caught:
        ScaleOptions(1).check(Ranks())
    assert len(str(caught.value).splitlines()) == 1


def test_fewer_samples_than_processes_are_refused(tmp_path: Path) -> None:
    recipe = Recipe.load(write_recipe(tmp_path / "recipe.toml", {"update": {"updates": 2}}))
    recipe.check_spread(Ranks(0, 3))
    with pytest.raises(ValueError, match="6 samples for 2 updates: 4 processes need one each"):
        recipe.check_spread(Ranks(0, 4))
