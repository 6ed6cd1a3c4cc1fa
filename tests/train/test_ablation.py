"""The ablation: what it counts, its statistics, its report, and a tiny one from nothing to its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realign.rewards.clip import ClipEncoder
from realign.runtime.request import Prompt, Request, Sample
from realign.runtime.settings import Settings
from realign.world.render import render
from realign.world.scene import Scene
from realign.world.tasks import WorldSample, sample
from realign.world.variants import draw_variant
from train.ablation.figure import SPAN, smooth
from train.ablation.measure import judge_pictures, score_captions
from train.ablation.plan import ALIGNED, BASE, RID, STARTS, VARIANTS, Layout, list_jobs
from train.ablation.report import COLUMNS, write_report
from train.ablation.statistics import estimate

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "train" / "recipes" / "ablation"


def make(drawn: WorldSample, scene: Scene) -> Sample:
    request = Request("one", Prompt.build([drawn.text]), 0, Settings(64, 64))
    return Sample(request, Image.fromarray(render(scene)), None, None)


@pytest.mark.parametrize("task", ["in_context", "edit"])
def test_a_true_picture_has_all_points_and_a_wrong_one_has_not(task: str) -> None:
    rng = np.random.default_rng(0)
    drawn = [sample(task, index, 3, "val") for index in range(40)]
    right = judge_pictures(drawn, [make(one, one.target) for one in drawn])
    assert all(set(right[name]) == {10.0} for name in ("following", "consistency", "overall"))
    assert set(right["all_right"]) == {1.0}
    scenes = [draw_variant(rng, one.target, "background") for one in drawn]
    wrong = judge_pictures(drawn, [make(one, scene) for one, scene in zip(drawn, scenes, strict=True)])
    assert set(wrong["following"]) == {7.5}
    assert 0 < np.mean(wrong["consistency"]) < 10
    for following, consistency, overall in zip(*(wrong[n] for n in list(wrong)[:3]), strict=True):
        assert overall == pytest.approx((following * consistency) ** 0.5)


def test_subjects_are_consistent_wherever_they_stand() -> None:
    rng = np.random.default_rng(1)
    drawn = [sample("in_context", index, 3, "val") for index in range(30)]
    moved = [draw_variant(rng, one.target, "place") for one in drawn]
    found = judge_pictures(drawn, [make(one, scene) for one, scene in zip(drawn, moved, strict=True)])
    assert set(found["consistency"]) == {10.0}
    reshaped = [draw_variant(rng, one.target, "shape") or one.target for one in drawn]
    found = judge_pictures(drawn, [make(one, scene) for one, scene in zip(drawn, reshaped, strict=True)])
    assert np.mean(found["consistency"]) < 9


def test_the_clip_is_asked_about_the_true_caption() -> None:
    drawn = [sample("in_context", index, 3, "val") for index in range(8)]
    encoder = ClipEncoder("mini", "cpu")
    own = score_captions(drawn, [make(one, one.target) for one in drawn], encoder)
    other = score_captions(drawn, [make(one, drawn[i - 1].target) for i, one in enumerate(drawn)], encoder)
    assert min(own) > max(other)
    assert max(own) <= 100


def test_errors_count_seeds_and_scenes() -> None:
    """Against numbers drawn with known deviations of seeds and of scenes."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        seeds, scenes = rng.normal(0, 0.3, (5, 1)), rng.normal(0, 2.0, (1, 80))
        found.append(estimate(seeds + scenes + rng.normal(0, 1.0, (5, 80))))
    truth = (0.3**2 / 5 + 2.0**2 / 80 + 1.0**2 / 400) ** 0.5
    assert np.std([one.mean for one in found]) == pytest.approx(truth, rel=0.1)
    assert np.sqrt(np.mean([one.error**2 for one in found])) == pytest.approx(truth, rel=0.1)
    one_seed = estimate(np.asarray([[1.0, 3.0]]))
    assert (one_seed.mean, one_seed.error) == (2.0, 1.0)


def test_jobs_wait_for_what_they_start_from() -> None:
    jobs = list_jobs(3)
    assert len(jobs) == 2 * (1 + 4 * 3)
    seen: set[str] = set()
    for job in jobs:
        assert seen.issuperset(job.needs)
        seen.add(job.name)
    by_name = {job.name: job for job in jobs}
    assert by_name["train/rga-rid-2"].needs == ("train/sft-iccot-2",)
    assert by_name["measure/base"].needs == ("train/base",)


def test_smoothing_looks_back() -> None:
    values = np.arange(40, dtype=float)
    found = smooth(values)
    assert found[0] == 0
    assert found[2] == 1
    assert found[-1] == np.mean(values[-SPAN:])


def test_a_report_says_what_was_measured(tmp_path: Path) -> None:
    layout, rng = Layout(tmp_path, RECIPES), np.random.default_rng(0)
    for number, variant in enumerate(VARIANTS):
        for seed in range(1 if variant == BASE else 2):
            path = layout.measured(variant, seed)
            path.parent.mkdir(parents=True)
            reasons = STARTS.get(variant) not in (None, BASE) or variant == "sft-iccot"
            columns = list(COLUMNS) if reasons else list(COLUMNS)[:6]
            path.write_text(json.dumps({c: (number + rng.random(6)).tolist() for c in columns}))
            if variant in ALIGNED:
                log = layout.log(variant, seed)
                log.parent.mkdir(parents=True)
                log.write_text("".join(json.dumps({"reward": i / 9, "spread": 0.1}) + "\n" for i in range(9)))
    text = write_report(layout, 2)
    assert (tmp_path / "table.md").read_text() == f"{text}\n"
    assert "[7.61]" in text.split("\n")[6]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary[RID]["overall"]["mean"] == pytest.approx(4.5, abs=0.3)
    assert summary[f"{RID} - sft-iccot"]["overall"]["mean"] == pytest.approx(2.0, abs=0.4)
    assert Image.open(tmp_path / "rewards.png").size[0] > 800


SFT = """
start = "{start}"
precision = "float32"
seed = 0
checkpoint_every = 1
log_every = 1
[optimization]
steps = 2
learning_rate = 1e-3
[mixture]
num_scenes = 12
text_dropout = 0.1
image_dropout = 0.1
timestep_shift = 3.0
[mixture.counts]
"in_context/{mode}" = 2
"edit/{mode}" = 2
"""
RGA = """
start = "sft-iccot"
reward = "oracle"
iterations = 2
checkpoint_every = 1
[data]
tasks = ["in_context", "edit"]
[rollout]
prompts = 2
group = 3
num_timesteps = 4
max_tokens = 8
[window]
size = 1
[update]
clip_low = 0.2
clip_high = 0.2
[guards]
patience = 9
"""


@pytest.mark.slow
def test_a_tiny_ablation_from_nothing_to_its_table(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name, mode in (("base", "none"), ("sft", "none"), ("sft-iccot", "ic-cot")):
        (recipes / f"{name}.toml").write_text(SFT.format(start="mini", mode=mode))
    (recipes / "rga.toml").write_text(RGA)
    command = [sys.executable, "-m", "train.ablation", f"--out={tmp_path / 'out'}", f"--recipes={recipes}"]
    command += ["--seeds=1", "--scenes=2", "--jobs=2", "--device=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert first.returncode == 0, first.stderr
    assert "(10 of 10 done)" in first.stdout
    assert "(d) (b) + RGA with RID" in first.stdout
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0
    assert " min (" not in again.stdout
    assert again.stdout in first.stdout


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--seeds=0"], "--seeds is 0: must be at least 1"),
        (["--job=train/nothing"], "--job is 'train/nothing'"),
        (["--job=train/sft-0"], "needs train/base: do that first"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, options: list[str], what: str) -> None:
    from train.ablation.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main([f"--out={tmp_path}", *options])
    assert stopped.value.code == 2


def test_recipes_load() -> None:
    from train import sft
    from train.recipe import Recipe

    counts = [sum(sft.Recipe.load(RECIPES / f"{n}.toml").mixture.counts.values()) for n in VARIANTS[1:3]]
    steps = [sft.Recipe.load(RECIPES / f"{n}.toml").optimization.steps for n in VARIANTS[1:3]]
    assert counts[0] == counts[1]
    assert steps[0] == steps[1]
    assert Recipe.load(RECIPES / "rga.toml").rollout.reasoning == "ic-cot"
