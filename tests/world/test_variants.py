"""Variants: one thing differs, and only that."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from realign.world.scene import SHAPES, Object, Scene, sample_scene
from realign.world.variants import ATTRIBUTES, KINDS, OTHER_ERRORS, draw_variant


def differing(scene: Scene, other: Scene) -> dict[str, int]:
    """How many objects differ, and in how many of their fields; 1 for the background."""
    gone, come = set(scene.objects) - set(other.objects), set(other.objects) - set(scene.objects)
    fields = Counter()
    if len(gone) == len(come) == 1:
        (old,), (new,) = gone, come
        fields.update(
            name for name in ("cell", "shape", "colour", "size") if getattr(old, name) != getattr(new, name)
        )
    else:
        fields.update({"gone": len(gone), "come": len(come)})
    fields["background"] = int(scene.background != other.background)
    return {name: count for name, count in fields.items() if count}


EXPECTED = {
    "shape": {"shape": 1},
    "colour": {"colour": 1},
    "size": {"size": 1},
    "place": {"cell": 1},
    "background": {"background": 1},
    "missing": {"gone": 1},
    "extra": {"come": 1},
    "swap": {"gone": 2, "come": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_thing_differs(kind):
    rng, found = np.random.default_rng(0), 0
    for number in range(300):
        scene = sample_scene(rng, 1 + number % 3)
        variant = draw_variant(rng, scene, kind)
        if variant is None:
            continue
        found += 1
        assert differing(scene, variant) == EXPECTED[kind]
        assert len({o.name for o in variant.objects}) == len(variant.objects)
        assert len({o.cell for o in variant.objects}) == len(variant.objects)
    assert found > 100


def test_kinds():
    assert set(KINDS) == set(EXPECTED) == set(ATTRIBUTES) | set(OTHER_ERRORS)


def test_what_a_scene_cannot_have():
    one = Scene("fog", (Object(4, "ring", "red", "small"),))
    rng = np.random.default_rng(0)
    assert draw_variant(rng, one, "missing") is None, "a picture of nothing has no caption"
    assert draw_variant(rng, one, "swap") is None


def test_every_value_comes_up():
    rng, scene = np.random.default_rng(0), Scene("fog", (Object(4, "ring", "red", "small"),))
    drawn = {draw_variant(rng, scene, "shape").objects[0].shape for _ in range(200)}
    assert drawn == set(SHAPES) - {"ring"}
    places = {draw_variant(rng, scene, "place").objects[0].cell for _ in range(300)}
    assert places == set(range(9)) - {4}
