"""Rollouts: windows and prompts are functions of the iteration; chains are shared or each sample's own."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from realign.model.bagel import Bagel
from realign.rewards.base import Scored, WeightedSum
from realign.rewards.function import FunctionReward
from tests.train.rga_runs import build_recipe
from train.measure import measure_chains
from train.prompts import DataOptions, FileSource, WorldSource, choose_items
from train.ranks import Ranks
from train.rga import Aligner
from train.rollouts import RolloutOptions, WindowOptions, cut_parts, score

WORLD = DataOptions(tasks=("t2i", "in_context"), num_prompts=7)


def place_all(window: WindowOptions, count: int = 60, num_steps: int = 14) -> list[tuple[int, int]]:
    return [window.place(0, iteration, num_steps).window for iteration in range(count)]


def test_a_random_window_is_anywhere_in_its_range() -> None:
    window = WindowOptions(size=3, first=1, end=7)
    places = place_all(window)
    assert {start for start, _ in places} == {1, 2, 3, 4}
    assert {size for _, size in places} == {3}
    assert places == place_all(window)
    assert [window.place(1, i, 14).window for i in range(60)] != places


def test_a_sliding_window_moves_on_and_begins_again() -> None:
    window = WindowOptions(size=2, first=0, end=5, move="slide", every=2)
    starts = [start for start, _ in place_all(window, 10)]
    assert starts == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]


def test_a_window_of_all_steps_stays() -> None:
    assert set(place_all(WindowOptions(size=13))) == {(0, 13)}
    assert set(place_all(WindowOptions("flow-grpo", size=14, end=14))) == {(0, 14)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowOptions(level=0.0), "level is 0.0"),
        (lambda: WindowOptions(move="jump"), "move is 'jump'"),
        (lambda: WindowOptions(size=0), "size is 0"),
        (lambda: WindowOptions(rule="cps", level=2.0), "level is 2.0"),
        (lambda: WindowOptions(size=4).count_places(4), "window of 4 steps from 0 to before 3"),
        (lambda: WindowOptions("flow-grpo", end=9).count_places(8), "in the first 8 steps"),
        (lambda: WindowOptions("cps", end=8).count_places(8), "in the first 7 steps"),
        (lambda: RolloutOptions(group=1), "groups of 1"),
        (lambda: RolloutOptions(reasoning="hard"), "reasoning is 'hard'"),
        (lambda: RolloutOptions(batch_size=0), "batch_size is 0"),
        (lambda: DataOptions(), "give one of them"),
        (lambda: DataOptions(prompts="x.txt", tasks=("t2i",)), "give one of them"),
        (lambda: DataOptions(tasks=("draw",)), "'draw'"),
        (lambda: DataOptions(tasks=("t2i",), split="dev"), "split is 'dev'"),
        (lambda: DataOptions(tasks=("t2i",), num_prompts=0), "num_prompts is 0"),
    ],
)
def test_options_of_no_use_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_every_pass_has_each_prompt_once_in_an_order_of_its_own() -> None:
    source = WorldSource(WORLD, seed=0)
    number = {source[index].prompt.parts[-1].text: index for index in range(7)}
    assert len(number) == 7
    chosen = [number[item.prompt.parts[-1].text] for i in range(7) for item in choose_items(source, 0, i, 2)]
    first, second = chosen[:7], chosen[7:]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert Counter(len(item.prompt.pictures) > 0 for item in choose_items(source, 0, 0, 7)) == {
        False: 4,
        True: 3,
    }


def test_prompts_of_a_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    prompt = [{"image": "red.png"}, {"text": "such a mug"}]
    rows = [{"id": "one", "prompt": prompt}, {"id": "two", "prompt": "a mug"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = FileSource(str(tmp_path / "prompts.jsonl"))
    assert len(source) == 2
    assert [len(source[index].prompt.pictures) for index in range(2)] == [1, 0]
    assert source[0].prompt.parts[1].text == "such a mug"
    with pytest.raises(ValueError, match="missing"):
        FileSource(str(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_parts_of_all_processes_are_all_samples(num_parts: int) -> None:
    options = RolloutOptions(prompts=3, group=5)
    shares = [cut_parts(options, num_parts, Ranks(rank, 2)) for rank in range(2)]
    parts = list(zip(*shares, strict=True))
    assert len(parts) == num_parts
    assert [number for own in parts for share in own for number in share] == list(range(15))


def test_chains_are_each_samples_own_or_one_of_the_group(tmp_path: Path) -> None:
    """And so do not depend on who else is sampled, or in how many processes."""
    made = {}
    for is_shared in (False, True):
        changes = {"rollout": {"reasoning": "think", "shared_chain": is_shared}}
        roller = Aligner(build_recipe(tmp_path, changes), Ranks()).roller
        whole = roller.roll(3, range(6))
        assert [rollout.group for rollout in whole] == [0, 0, 0, 1, 1, 1]
        texts = [rollout.sample.reasoning.text for rollout in whole]
        made[is_shared] = [len(set(texts[:3])), len(set(texts[3:]))]
        assert measure_chains(whole, Ranks()) == {
            "distinct_chains": sum(made[is_shared]) / 6,
            "failures": 0.0,
        }
        part = roller.roll(3, [2, 4])
        for one, number in zip(part, (2, 4), strict=True):
            assert one.sample.reasoning.text == texts[number]
            (ours, *_), (theirs, *_) = (
                rollout.sample.trajectory.recording.noisy_steps for rollout in (one, whole[number])
            )
            assert ours.logprob == theirs.logprob
        logprobs = {r.sample.trajectory.recording.noisy_steps[0].logprob for r in whole}
        assert len(logprobs) == 6, "noise is each sample's own"
    assert made == {False: [3, 3], True: [1, 1]}


def test_a_group_has_one_window(tmp_path: Path) -> None:
    roller = Aligner(build_recipe(tmp_path), Ranks()).roller
    starts = set()
    for iteration in range(6):
        recordings = [r.sample.trajectory.recording for r in roller.roll(iteration, range(4))]
        indexes = {tuple(step.index for step in recording.noisy_steps) for recording in recordings}
        assert len(indexes) == 1
        starts |= indexes
    assert len(starts) > 1


def test_rewards_get_what_they_need(tmp_path: Path) -> None:
    changes = {"data": {"tasks": ["t2i"]}, "rollout": {"reasoning": "ic-cot"}}
    (rollout,) = Aligner(build_recipe(tmp_path, changes), Ranks()).roller.roll(0, [4])
    scored = rollout.to_scored()
    assert scored.name == "0/4"
    assert scored.prompt == rollout.item.prompt.parts[0].text
    assert scored.instruction is rollout.item.instruction is not None
    assert scored.reasoning == rollout.sample.reasoning.text
    assert scored.caption is None, "an untrained model writes no IC-CoT"
    assert scored.is_malformed
    assert scored.picture.shape == (32, 32, 3)
    assert replace(rollout, group=0).group == 0


def test_rewards_see_pictures_on_the_device_and_the_update_has_none_there(tmp_path: Path) -> None:
    aligner, seen = Aligner(build_recipe(tmp_path), Ranks()), []

    class Noted(FunctionReward):
        def score(self, samples: Sequence[Scored]) -> torch.Tensor:
            seen.extend((weakref.ref(one.picture), one.picture.numpy().copy()) for one in samples)
            return super().score(samples)

    rollouts = aligner.roller.roll(0, range(6))
    reward = WeightedSum([(Noted("tests.train.rewards:brightness"), 1.0)])
    score_N = score(reward, rollouts)[:, 0]
    for rollout, (picture, levels), value in zip(rollouts, seen, score_N.tolist(), strict=True):
        assert picture() is None, "its memory would be the device's through the update"
        assert isinstance(rollout.sample.picture, Image.Image)
        np.testing.assert_array_equal(rollout.sample.image, levels)
        assert value == np.float32(levels.mean() / 255)
    assert len({levels.tobytes() for _, levels in seen}) == 6
    again = score(reward, rollouts[:0])
    assert again.shape == (0, 1)


def test_free_text_has_no_form_to_fail_in(tmp_path: Path) -> None:
    changes = {"data": {"tasks": ["t2i"]}, "rollout": {"reasoning": "think"}}
    (rollout,) = Aligner(build_recipe(tmp_path, changes), Ranks()).roller.roll(0, [4])
    assert not rollout.to_scored().is_malformed


def test_a_model_that_is_there_is_taken(tmp_path: Path) -> None:
    recipe = build_recipe(tmp_path)
    model = Bagel.from_pretrained(recipe.start)
    assert Aligner(recipe, Ranks(), model).engine.model is model
