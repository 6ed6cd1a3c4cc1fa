"""The drawn samples: valid, open where people leave things open, deterministic, fast."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest

from realign.reasoning.schemas import ICCoT, format_iccot, parse_iccot
from realign.world.language import read_caption, write_caption
from realign.world.oracle import is_valid_reading
from realign.world.scene import NUM_CELLS, SIZES, Scene, sample_scene
from realign.world.tasks import TASKS, check_reasoning, num_readings, sample


@pytest.mark.parametrize("task", TASKS)
def test_the_reasoning_is_a_valid_reading_that_leads_to_the_target(task: str) -> None:
    for index in range(300):
        drawn = sample(task, index, seed=1)
        read = parse_iccot(format_iccot(drawn.iccot), len(drawn.references))
        check_reasoning(read, drawn)
        assert read_caption(read.caption) == drawn.target


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_functions_of_their_arguments(task: str) -> None:
    one, again = sample(task, 7, seed=3, split="val"), sample(task, 7, seed=3, split="val")
    assert (one.text, one.iccot, one.target) == (again.text, again.iccot, again.target)
    assert all(
        np.array_equal(a.picture, b.picture) for a, b in zip(one.references, again.references, strict=True)
    )
    assert sample(task, 8, seed=3, split="val").target != one.target


@pytest.mark.parametrize("task", TASKS)
def test_one_two_and_three_objects_have_equal_shares(task: str) -> None:
    counts = Counter(len(sample(task, i).target.objects) for i in range(300))
    assert counts == {1: 100, 2: 100, 3: 100}


def test_pictures_repeat_and_wordings_do_not() -> None:
    first, later = sample("in_context", 5, num_scenes=100), sample("in_context", 105, num_scenes=100)
    assert first.target == later.target
    texts = {sample("in_context", 5 + 100 * i, num_scenes=100).text for i in range(20)}
    assert len(texts) > 10


@pytest.mark.parametrize("task", TASKS)
def test_instructions_leave_choices_open(task: str) -> None:
    share = np.mean([num_readings(sample(task, i).instruction, at_least=2) > 1 for i in range(300)])
    assert share > 0.25


def test_readings_are_counted_as_they_are_judged() -> None:
    """Every scene with the wanted shapes and colours, tried one by one."""
    drawn = next(d for d in (sample("in_context", i) for i in range(100)) if len(d.target.objects) == 2)
    (first, second), valid = drawn.target.objects, 0
    for cells in permutations(range(NUM_CELLS), 2):
        for sizes in product(SIZES, repeat=2):
            objects = tuple(
                replace(o, cell=c, size=z) for o, c, z in zip((first, second), cells, sizes, strict=True)
            )
            valid += is_valid_reading(Scene(drawn.target.background, objects), drawn.instruction)
    assert valid == num_readings(drawn.instruction, at_least=10_000) > 0


def test_wrong_reasoning_is_refused() -> None:
    drawn = next(d for d in (sample("in_context", i) for i in range(50)) if len(d.references) >= 2)
    good = drawn.iccot
    for wrong, message in [
        (ICCoT("a thing", good.relations), "names no object"),
        (ICCoT(good.caption + " and a small red bar at the top", good.relations), "caption"),
        (ICCoT(good.caption, good.relations[:1]), "relations for"),
        (ICCoT(good.caption, tuple(reversed(good.relations))), "relation 1 is wrong"),
        (ICCoT(good.caption.replace(drawn.target.background, "moon"), good.relations), "background"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_reasoning(wrong, drawn)


def test_captions_round_trip_in_any_order() -> None:
    rng = np.random.default_rng(0)
    for index in range(200):
        scene = sample_scene(rng, 1 + index % 3)
        order = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
        assert read_caption(write_caption(order, scene.background)) == scene


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'draw'"):
        sample("draw", 0)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        sample("t2i", 0, split="dev")


def test_samples_are_fast_enough_to_train_on() -> None:
    """Hundreds a second on one core; the bound is slack, for busy machines."""
    began = time.process_time()
    for index in range(300):
        sample(TASKS[index % 3], index).render_target()
    assert 300 / (time.process_time() - began) > 300
