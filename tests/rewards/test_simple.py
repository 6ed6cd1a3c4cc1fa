"""`format`, `oracle` and `function`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from realign.reasoning.schemas import ICCoT, format_iccot
from realign.rewards.base import RewardError, Scored
from realign.rewards.format import FormatReward
from realign.rewards.function import FunctionReward
from realign.rewards.oracle import OracleReward
from realign.rewards.pictures import to_array
from realign.world.instructions import Instruction, ObjectSpec
from realign.world.language import write_caption
from realign.world.render import render
from realign.world.scene import Object, Scene
from tests.rewards.conftest import draw_picture, make_sample

SCENE = Scene("night", (Object(0, "circle", "red", "large"), Object(8, "bar", "blue", "small")))
WRONG = Scene("night", (Object(0, "circle", "red", "large"), Object(8, "bar", "green", "small")))


@pytest.mark.parametrize(
    ("text", "num_references", "value"),
    [
        (format_iccot(ICCoT("a star", ("it is from image 1.",))), 1, 1.0),
        ('{"out_caption": "a star", "relations": [{"relation_1": "x"}]}', 1, 1.0),
        (format_iccot(ICCoT("a star")), 0, 1.0),
        (format_iccot(ICCoT("a star", ("it is from image 1.",))), 2, 0.0),
        (format_iccot(ICCoT("a star")), 1, 0.0),
        ("<out_caption>a star</out_caption> and more", 0, 0.0),
        ("", 0, 0.0),
    ],
)
def test_format(text, num_references, value):
    references = [draw_picture(i) for i in range(num_references)]
    assert FormatReward().score([make_sample(reasoning=text, references=references)]).tolist() == [value]


def test_format_of_no_reasoning_is_an_error():
    with pytest.raises(RewardError, match="reward format: sample 's0': it has no reasoning"):
        FormatReward().score([make_sample()])


def shown(scene: Scene, **changes: object) -> Scored:
    return make_sample(picture=Image.fromarray(render(scene)), **changes)


def test_oracle_against_instruction_caption_and_prompt():
    caption, wrong = write_caption(SCENE.objects, "night"), write_caption(WRONG.objects, "night")
    asked = Instruction("night", (ObjectSpec("circle", "red"), ObjectSpec("bar", None)))
    samples = [
        shown(SCENE, caption=caption),
        shown(SCENE, caption=wrong),
        shown(SCENE, prompt=wrong),
        shown(SCENE, caption=wrong, instruction=asked),
        shown(SCENE, prompt=wrong, caption=caption),
    ]
    assert OracleReward().score(samples).tolist() == [1.0, 0.875, 0.875, 1.0, 1.0]
    assert OracleReward("strict").score(samples).tolist() == [1.0, 0.0, 0.0, 1.0, 1.0]


def test_oracle_of_an_edit_counts_what_had_to_stay():
    kept = ObjectSpec.of(WRONG.objects[1], preserved=True)
    asked = Instruction("night", (ObjectSpec("circle", "red"), kept), (), WRONG)
    # half the objects, count, relations, background; what had to stay did not
    assert OracleReward().score([shown(SCENE, instruction=asked)]).tolist() == pytest.approx([3.5 / 5])


def test_oracle_takes_every_kind_of_picture():
    caption, pixels = write_caption(SCENE.objects, "night"), torch.from_numpy(render(SCENE))
    decoded = (pixels.permute(2, 0, 1) + 0.5) / 255 * 2 - 1  # amid each level
    samples = [make_sample(picture=picture, caption=caption) for picture in (pixels, decoded)]
    assert OracleReward("strict").score(samples).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"prompt": "hello"}, "no caption of the world"), ({"picture": draw_picture(0, (32, 64))}, "is 32x64")],
)
def test_what_the_oracle_cannot_judge_is_an_error(changes, said):
    with pytest.raises(RewardError, match="reward oracle: sample 's0'") as error:
        OracleReward().score([make_sample(**changes)])
    assert said in str(error.value)


def test_a_float_picture_is_cut_to_8_bits_as_when_it_is_saved():
    levels = torch.linspace(-1.2, 1.2, 64 * 64).reshape(1, 64, 64).repeat(3, 1, 1)
    levels[0, 0, 0] = float("nan")
    unit = (levels.permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1).nan_to_num(0.0)
    np.testing.assert_array_equal(to_array(levels), (unit * 255).numpy().astype(np.uint8))


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_modules: None) -> str:
    (tmp_path / "own_rewards.py").write_text(
        "import torch\n"
        "def length(samples): return [len(s.prompt) for s in samples]\n"
        "def tensor(samples): return torch.arange(len(samples), dtype=torch.float64)\n"
        "def broken(samples): raise KeyError('colour')\n"
        "def short(samples): return []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "own_rewards"


def test_a_function(own_module):
    samples = [make_sample(0, prompt="abc"), make_sample(1, prompt="abcd")]
    assert FunctionReward(f"{own_module}:length").score(samples).tolist() == [3.0, 4.0]
    values = FunctionReward(f"{own_module}:tensor").score(samples)
    assert values.tolist() == [0.0, 1.0]
    assert values.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "said"),
    [("broken", "raised KeyError: 'colour'; samples 's0'; mend"), ("short", "one number each")],
)
def test_a_function_that_fails(own_module, name, said):
    with pytest.raises(RewardError, match=f"reward function:own_rewards:{name}") as error:
        FunctionReward(f"{own_module}:{name}").score([make_sample()])
    assert said in str(error.value)
