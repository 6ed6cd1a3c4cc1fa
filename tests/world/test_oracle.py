"""The oracle: always right on true pictures, never on wrong ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from realign.world.instructions import Instruction, ObjectSpec, Relation
from realign.world.oracle import judge, judge_caption, read_pictures
from realign.world.render import render
from realign.world.scene import BACKGROUNDS, COLOURS, NUM_CELLS, SHAPES, SIZES, Object, Scene, sample_scene
from realign.world.tasks import TASKS, sample


def draw_scenes(num: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, 1 + i % 3) for i in range(num)]


def read(scene: Scene):
    return read_pictures([render(scene)])[0]


def test_every_object_is_read_on_every_background_and_place() -> None:
    scenes = [
        Scene(b, (Object(cell, s, c, z),))
        for b in BACKGROUNDS
        for i, (s, c, z) in enumerate((s, c, z) for s in SHAPES for c in COLOURS for z in SIZES)
        for cell in (i % NUM_CELLS, (i * 5 + 3) % NUM_CELLS)
    ]
    readings = read_pictures([render(s) for s in scenes])
    assert [r.scene for r in readings] == scenes
    assert all(not r.unclear for r in readings)


@pytest.mark.parametrize("task", TASKS)
def test_true_targets_are_all_right(task: str) -> None:
    drawn = [sample(task, i, seed=11, split="test") for i in range(400)]
    readings = read_pictures([d.render_target() for d in drawn])
    verdicts = [judge(r, d.instruction) for r, d in zip(readings, drawn, strict=True)]
    assert all(v.all_right and v.objects == 1 and v.count and v.relations and v.background for v in verdicts)
    assert {v.preserved for v in verdicts} == ({True} if task == "edit" else {None})


def test_one_wrong_attribute_is_wrong() -> None:
    """Every attribute of every object, a missing object, one too many, another background."""
    for index, scene in enumerate(draw_scenes(120)):
        reading = read(scene)
        thing, rest = scene.objects[0], scene.objects[1:]
        free = next(c for c in range(NUM_CELLS) if c not in {o.cell for o in scene.objects})
        other_shape = SHAPES[(SHAPES.index(thing.shape) + 1 + index % 5) % len(SHAPES)]
        other_colour = COLOURS[(COLOURS.index(thing.colour) + 1 + index % 6) % len(COLOURS)]
        wrong = [
            replace(thing, shape=other_shape),
            replace(thing, colour=other_colour),
            replace(thing, size=SIZES[1 - SIZES.index(thing.size)]),
            replace(thing, cell=free),
        ]
        captions = [Scene(scene.background, (w, *rest)) for w in wrong]
        captions.append(Scene(scene.background, (*scene.objects, Object(free, "bar", "red", "large"))))
        captions.append(replace(scene, background=BACKGROUNDS[(BACKGROUNDS.index(scene.background) + 1) % 6]))
        if rest:
            captions.append(Scene(scene.background, rest))
        assert judge_caption(reading, scene).all_right
        for caption in captions:
            assert not judge_caption(reading, caption).all_right, (scene.key, caption.key)


def test_verdicts_say_what_is_wrong() -> None:
    red, blue = Object(0, "circle", "red", "large"), Object(8, "ring", "blue", "small")
    wanted = Instruction(
        "fog", (ObjectSpec("circle", "red"), ObjectSpec("ring", "blue")), (Relation(0, "above", 1),)
    )
    assert judge(read(Scene("fog", (red, blue))), wanted).all_right
    recoloured = judge(read(Scene("fog", (red, replace(blue, colour="pink")))), wanted)
    assert (recoloured.objects, recoloured.colours, recoloured.count) == (0.5, 0.5, True)
    upside_down = judge(read(Scene("fog", (replace(red, cell=8), replace(blue, cell=0)))), wanted)
    assert upside_down.objects == 1
    assert not upside_down.relations
    assert not upside_down.all_right
    assert not judge(read(Scene("snow", (red, blue))), wanted).background
    crowded = judge(read(Scene("fog", (red, blue, Object(4, "bar", "green", "large")))), wanted)
    assert crowded.objects == 1
    assert not crowded.count
    assert not crowded.all_right


def test_an_edit_must_keep_what_it_was_not_asked_to_change() -> None:
    found = 0
    for index in range(200):
        drawn = sample("edit", index, seed=5)
        must_stay = [s for s in drawn.instruction.specs if s.preserved]
        kept = [o for o in drawn.target.objects if any(s.admits(o) for s in must_stay)]
        if not kept:
            continue
        found += 1
        moved = replace(kept[0], size=SIZES[1 - SIZES.index(kept[0].size)])
        broken = Scene(
            drawn.target.background, tuple(moved if o == kept[0] else o for o in drawn.target.objects)
        )
        verdict = judge(read(broken), drawn.instruction)
        assert verdict.preserved is False
        assert not verdict.all_right
    assert found > 80


def test_the_unedited_picture_is_not_an_edit() -> None:
    drawn = [sample("edit", i, seed=6) for i in range(200)]
    readings = read_pictures([render(d.instruction.source) for d in drawn])
    assert not any(judge(r, d.instruction).all_right for r, d in zip(readings, drawn, strict=True))


@pytest.mark.parametrize("kind", ["noise", "blank", "blur", "half", "moved", "between"])
def test_spoilt_pictures_are_never_right(kind: str) -> None:
    rng = np.random.default_rng(1)
    scenes = draw_scenes(60, seed=2)
    pictures = np.stack([render(s) for s in scenes])
    shifts = [(i, j) for i in range(-8, 9, 4) for j in range(-8, 9, 4)]
    spoilt = {
        "noise": lambda: rng.integers(0, 256, pictures.shape).astype(np.uint8),
        "blank": lambda: np.full_like(pictures, 128),
        "blur": lambda: np.mean([np.roll(pictures, shift, (1, 2)) for shift in shifts], 0).astype(np.uint8),
        "half": lambda: np.where(np.arange(64)[:, None, None] % 21 < 10, pictures, render(Scene("fog", ()))),
        "moved": lambda: np.roll(pictures, 5, axis=2),
        "between": lambda: np.roll(pictures, 10, axis=1),
    }[kind]()
    readings = read_pictures(spoilt)
    assert not any(judge_caption(r, s).all_right for r, s in zip(readings, scenes, strict=True))


def test_a_little_noise_does_not_blind_it() -> None:
    rng = np.random.default_rng(1)
    scenes = draw_scenes(100, seed=4)
    noisy = [np.clip(render(s) + rng.normal(0, 10, (64, 64, 3)), 0, 255).astype(np.uint8) for s in scenes]
    assert all(judge_caption(r, s).all_right for r, s in zip(read_pictures(noisy), scenes, strict=True))


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, 64, 64, 3\]"):
        read_pictures(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="float"):
        read_pictures(np.zeros((1, 64, 64, 3), np.float32))
    assert read_pictures([]) == []
