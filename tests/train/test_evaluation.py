"""Held-out evaluation: it measures the averaged weights, shows what it measured, and changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import load_file

from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from tests.train.rga_runs import FULL, assert_same_weights, build_recipe, read_log, read_weights
from train.evaluation import Evaluation, Evaluator, Judged
from train.journal import load_rows
from train.ranks import Ranks
from train.rga import Aligner, run
from train.watch import build_evaluator

EVALUATED = {"evaluation": {"every": 1, "num_prompts": 3, "samples": 2, "shown": 2, "temperature": 1.0}}
TWO_TERMS = {"reward": "function:tests.train.rewards:brightness*2+function:tests.train.rewards:redness"}


def read_rows(out: Path) -> list[dict]:
    return load_rows(out / "evaluations.jsonl")


def leave_out_times(rows: list[dict]) -> list[dict]:
    names = ("seconds", "samples_per_second", "images_per_second", "memory_gb")
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "lora"])
def test_evaluations_do_not_change_the_run_and_outlast_a_restart(tmp_path: Path, policy: str) -> None:
    """Bit for bit: without evaluations, with them, and with them in two pieces."""
    changes = {"policy": {"kind": policy, "rank": 2, "alpha": 4.0}}
    run(build_recipe(tmp_path, FULL, changes), tmp_path / "without", Ranks())
    run(build_recipe(tmp_path, FULL, changes, EVALUATED), tmp_path / "whole", Ranks())
    run(build_recipe(tmp_path, FULL, changes, EVALUATED, {"iterations": 1}), tmp_path / "pieces", Ranks())
    run(build_recipe(tmp_path, FULL, changes, EVALUATED), tmp_path / "pieces", Ranks())
    assert not (tmp_path / "without" / "evaluations.jsonl").exists() or not read_rows(tmp_path / "without")
    for name in ("whole", "pieces"):
        assert_same_weights(tmp_path / "without", tmp_path / name)
        rows = leave_out_times(read_log(tmp_path / name))
        assert rows == leave_out_times(read_log(tmp_path / "without"))
    whole, pieces = (leave_out_times(read_rows(tmp_path / name)) for name in ("whole", "pieces"))
    assert [row["step"] for row in whole] == [0, 1, 2]
    assert pieces == whole
    assert len({row["reward"] for row in whole}) == 3, "the weights that are measured are not the same"


def test_what_is_measured_is_what_is_exported(tmp_path: Path) -> None:
    """The averaged weights: those in out/model, in an engine of their own, give the last row's reward."""
    recipe = build_recipe(tmp_path, FULL, EVALUATED)
    run(recipe, tmp_path / "out", Ranks())
    engine = Engine(Bagel.from_pretrained(tmp_path / "out" / "model"), PROGRAMS)
    aligner = Aligner(recipe, Ranks())
    data = (recipe.data, recipe.rollout)
    evaluation = Evaluator(engine, aligner.reward, recipe.evaluation, data, Ranks()).evaluate()
    rows = read_rows(tmp_path / "out")
    assert evaluation.describe()["reward"] == rows[-1]["reward"] != rows[0]["reward"]
    assert all(judged.shown is not None for judged in evaluation.judged[:4])
    assert all(judged.shown is None for judged in evaluation.judged[4:])


class Links(HTMLParser):
    """The relative addresses of a page, without fragments."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        address = given.get("href") or given.get("src") or "#"
        self.found |= {unquote(address)} - {address if address.startswith("#") else ""}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_pages_show_what_was_measured(tmp_path: Path) -> None:
    changes = {"iterations": 3, "evaluation": {"every": 2}}
    run(build_recipe(tmp_path, FULL, EVALUATED, TWO_TERMS, changes), tmp_path / "out", Ranks())
    folder = tmp_path / "out" / "evaluations"
    rows = read_rows(tmp_path / "out")
    assert [row["step"] for row in rows] == [0, 2, 3]
    for path in folder.rglob("*.html"):
        for address in Links(path).found:
            assert (path.parent / address).is_file(), (path, address)
    index = Links(folder / "index.html")
    assert index.found >= {f"step-{step:08d}/index.html" for step in (0, 2, 3)}
    for row in rows:
        assert f"{row['reward']:.4f}" in index.text
        page = Links(folder / f"step-{row['step']:08d}" / "index.html")
        assert len([link for link in page.found if link.startswith("images/")]) == 4
        assert any(link.startswith("../references/") for link in page.found)
        assert "../index.html" in page.found
    records = [json.loads(line) for line in (folder / "step-00000003" / "records.jsonl").open()]
    assert [(record["id"], record["index"]) for record in records] == [
        (f"{prompt:03d}", index) for prompt in range(3) for index in range(2)
    ]
    names = [f"function:tests.train.rewards:{name}" for name in ("brightness", "redness")]
    for record in records:
        scores = record["scores"]
        assert scores["reward"] == pytest.approx(2 * scores[names[0]] + scores[names[1]])
        assert record["reasoning"]["text"]
    assert rows[-1]["reward"] == pytest.approx(sum(record["scores"]["reward"] for record in records) / 6)
    assert rows[-1]["rewards"].keys() == set(names)
    assert not list((folder / ".staging").iterdir())


def make_evaluation(rewards: list[float], samples: int = 1) -> Evaluation:
    judged = tuple(Judged(number, (reward,), None, None) for number, reward in enumerate(rewards))
    return Evaluation(("one",), (1.0,), samples, judged, 1.0)


def test_errors_are_over_prompts_and_gains_are_paired() -> None:
    row = make_evaluation([0.0, 2.0, 3.0, 5.0], samples=2).describe([1.0, 2.0, 3.0, 2.0])
    assert (row["reward"], row["n"]) == (2.5, 4)
    assert row["se"] == pytest.approx(1.5)  # of two prompts' means, 1 and 4
    assert row["gain"] == pytest.approx(0.5)
    assert row["gain_se"] == pytest.approx(1.0)  # of -0.5 and 1.5
    assert "failures" not in row
    assert "gain" not in make_evaluation([1.0]).describe()


def test_the_best_so_far_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The averaged weights of the highest evaluation after the start, whatever came later."""
    rewards = iter([0.5, 0.4, 0.6, 0.55])
    monkeypatch.setattr(Evaluator, "evaluate", lambda self: make_evaluation([next(rewards)] * 6, 2))
    changes = {"iterations": 3, "update": {"ema_decay": 0.9}}
    run(build_recipe(tmp_path, EVALUATED, changes), tmp_path / "out", Ranks())
    assert [row["reward"] for row in read_rows(tmp_path / "out")] == pytest.approx([0.5, 0.4, 0.6, 0.55])
    best = load_file(tmp_path / "out" / "best" / "ema.safetensors")
    state = load_file(tmp_path / "out" / "checkpoints" / "step-00000002" / "state.safetensors")
    name = "decoder.norm.gen.weight"
    model = Bagel.from_pretrained(tmp_path / "out" / "best")
    assert torch.equal(model.get_parameter(name), state[f"average.{name}"])
    last = read_weights(tmp_path / "out")
    assert any(not torch.equal(best[key], last[key]) for key in best)


def test_evaluations_by_other_settings_are_refused(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path, EVALUATED, {"iterations": 1})
    run(recipe, tmp_path / "out", Ranks())
    other = replace(recipe, evaluation=replace(recipe.evaluation, num_timesteps=7))
    with pytest.raises(ValueError, match=r"other settings \(steps was 5, is 7\): take the same"):
        run(other, tmp_path / "out", Ranks())


def test_an_evaluation_begins_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """And is compared with the first there is."""
    run(build_recipe(tmp_path, {"iterations": 1}), tmp_path / "out", Ranks())
    run(build_recipe(tmp_path, EVALUATED), tmp_path / "out", Ranks())
    first, second = read_rows(tmp_path / "out")
    assert (first["step"], second["step"]) == (1, 2)
    assert "gain" not in first
    assert second["gain"] == pytest.approx(second["reward"] - first["reward"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 0}, "evaluation every is 0: must be at least 1"),
        ({"num_prompts": 2}, "evaluation has no 'every'"),
        ({"every": 1, "split": "train"}, "evaluation split is 'train', as data's"),
        ({"every": 1, "tasks": ["t2i"], "prompts": "a.txt"}, "give one of them"),
        ({"every": 1, "num_timesteps": 1}, "num_timesteps is 1"),
        ({"every": 1, "reward": "beauty"}, "reward 'beauty' is not known"),
        ({"every": 1, "interval": 0.5}, "evaluation interval is 0.5: must be two numbers"),
    ],
)
def test_an_evaluation_that_cannot_be_made_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe(tmp_path, {"evaluation": change})


def test_a_file_of_prompts_needs_another_held_out(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a star\n")
    (tmp_path / "held-out.txt").write_text("a red ball\na blue star\n")
    data = {"data": {"prompts": str(tmp_path / "train.txt")}}
    given = build_recipe(tmp_path, {"evaluation": {"every": 1, "prompts": str(tmp_path / "held-out.txt")}})
    evaluator = build_evaluator(Aligner(given, Ranks()), given.evaluation)
    assert [item.prompt.parts[0].text for item in evaluator.items] == ["a red ball", "a blue star"]
    training = replace(given.data, prompts=str(tmp_path / "train.txt"), tasks=())
    with pytest.raises(ValueError, match="neither prompts nor tasks"):
        replace(given, data=training, evaluation=replace(given.evaluation, prompts=None))
    with pytest.raises(ValueError, match="as data's: name another file"):
        replace(given, data=training, evaluation=replace(given.evaluation, **data["data"]))
