"""The world benchmark: what it prints, paired modes, and that the shipped model is as good as said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import realign
from realign.api import Generator
from realign.evals.world import WorldOptions, build_request, evaluate, format_table, judge_samples
from realign.runtime.request import Reasoning, Sample
from realign.world.tasks import sample

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generator() -> Generator:
    return realign.load("mini", device="cpu")


@pytest.fixture(scope="module")
def result(generator: Generator) -> dict:
    return evaluate(generator, WorldOptions(split="val", num=48, seed=5))


def test_the_shipped_model_is_as_good_as_the_readme_says(result: dict) -> None:
    """A loose bound for 48 scenes a task: three standard errors below the figures to reach."""
    assert result["t2i"]["all_right"] > 0.65 - 0.2
    assert result["in_context"]["ic-cot"]["all_right"] > 0.65 - 0.2
    assert result["edit"]["ic-cot"]["all_right"] > 0.6 - 0.2
    assert result["reasoning_correct"] > 0.95 - 0.1
    assert result["margin"]["in_context"]["all_right"] > 2 * result["margin"]["in_context"]["se"]
    assert result["distinct_chains"] >= 8


def test_the_result_has_its_shape(result: dict) -> None:
    assert set(result) == {"t2i", "in_context", "edit", "reasoning_correct", "distinct_chains", "margin"}
    assert set(result["in_context"]) == set(result["edit"]) == {"none", "ic-cot"}
    for row in (result["t2i"], *result["in_context"].values(), *result["edit"].values()):
        assert row.keys() >= {"all_right", "se", "n", "objects", "background"}
        assert row["n"] == 48
        assert all(0 <= row[name] <= 1 for name in ("all_right", "objects", "background"))
    assert "preserved" in result["edit"]["none"]
    assert "preserved" not in result["t2i"]
    gain = result["in_context"]["ic-cot"]["all_right"] - result["in_context"]["none"]["all_right"]
    assert result["margin"]["in_context"]["all_right"] == pytest.approx(gain, abs=2e-4)
    assert format_table(result).count("\n") >= 8


def test_true_targets_score_everything_and_others_do_not() -> None:
    """The judging alone: pictures that are the targets, with the reasoning that leads to them."""
    drawn = [
        sample(task, i, seed=2, split="test") for task in ("t2i", "in_context", "edit") for i in range(4)
    ]
    made = []
    for one in drawn:
        reasoning = Reasoning("ic-cot", "", one.iccot.caption, one.iccot.relations)
        request = build_request(one, "x", WorldOptions().settings("ic-cot"), 0)
        made.append(Sample(request, Image.fromarray(one.render_target()), reasoning, None))
    right = judge_samples(drawn, made)
    assert all(o.verdict.all_right and o.reasoning_correct and o.shows_caption for o in right)
    shifted = judge_samples(drawn, made[1:] + made[:1])
    assert not any(o.verdict.all_right or o.reasoning_correct for o in shifted)


def test_the_command_ends_with_one_json_object() -> None:
    command = [sys.executable, "-m", "realign.cli", "eval", "world", "--num", "3", "--steps", "3"]
    done = subprocess.run(
        [*command, "--reasoning", "none"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert set(last) == {"t2i", "in_context", "edit"}
    assert set(last["in_context"]) == {"none"}


@pytest.mark.parametrize(
    "arguments",
    [("--num", "0"), ("--steps", "1"), ("--seed", "-1"), ("--model", "/no"), ("--cache-interval", "0")],
)
def test_bad_arguments_are_one_line(arguments: tuple[str, str]) -> None:
    command = [sys.executable, "-m", "realign.cli", "eval", "world", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
