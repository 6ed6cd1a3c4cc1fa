"""A picture on a device and the same as PIL score the same, and clip leaves it where it is."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from realign.rewards.base import Reward, Scored
from realign.rewards.clip import ClipEncoder, ClipReward, ImageSimilarityReward
from realign.rewards.function import FunctionReward
from realign.rewards.judge import build_question
from realign.rewards.oracle import OracleReward
from realign.rewards.pictures import bring_to_host
from realign.world.instructions import Instruction
from realign.world.render import render
from realign.world.scene import Object, Scene
from tests.rewards.conftest import draw_picture, make_sample

SCENES = [
    Scene("night", (Object(0, "circle", "red", "large"), Object(8, "bar", colour, "small")))
    for colour in ("blue", "green", "red")
]
ASKED, CAPTION = Instruction.exactly(SCENES[0]), "a red circle"


@pytest.fixture
def samples() -> list[Scored]:
    """Some as asked for, some not; one of noise."""
    pictures = [*(Image.fromarray(render(scene)) for scene in SCENES), draw_picture(3)]
    references = [draw_picture(4, (90, 70)), draw_picture(5)]
    return [
        make_sample(number, picture=picture, caption=CAPTION, references=references, instruction=ASKED)
        for number, picture in enumerate(pictures)
    ]


def put_on_device(sample: Scored) -> Scored:
    return replace(sample, picture=torch.from_numpy(np.array(sample.picture)))


def build(kind: str, clip_folder: Path) -> Reward:
    encoder = ClipEncoder(str(clip_folder), "cpu")
    return {
        "clip": lambda: ClipReward("x", encoder=encoder),
        "image_similarity": lambda: ImageSimilarityReward("x", encoder=encoder),
        "oracle": OracleReward,
        "function": lambda: FunctionReward("tests.train.rewards:redness"),
    }[kind]()


@pytest.mark.parametrize("kind", ["clip", "image_similarity", "oracle", "function"])
def test_scores_are_the_same_bit_for_bit(kind, clip_folder, samples):
    reward = build(kind, clip_folder)
    expected = reward.score(samples)
    assert len(set(expected.tolist())) > 1
    assert torch.equal(reward.score(list(map(put_on_device, samples))), expected)


def test_a_judge_is_shown_the_same(samples):
    ours, theirs = (build_question(one, "m") for one in (put_on_device(samples[3]), samples[3]))
    assert ours == theirs
    url = ours["messages"][0]["content"][2]["image_url"]["url"]
    shown = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    np.testing.assert_array_equal(shown, samples[3].picture)


def test_a_function_gets_pil_whatever_is_scored(samples):
    seen = []

    class Noted(FunctionReward):
        def __init__(self) -> None:
            self.name, self._function = "noted", lambda given: seen.extend(given) or [0.0] * len(given)

    floats = (put_on_device(samples[0]).picture.permute(2, 0, 1) + 0.5) / 255 * 2 - 1  # amid each level
    given = [
        samples[0],
        put_on_device(samples[0]),
        replace(samples[0], picture=floats, references=[floats, samples[0].references[0]]),
    ]
    Noted().score(given)
    for one in seen:
        assert all(isinstance(picture, Image.Image) for picture in (one.picture, *one.references))
        assert one.picture.tobytes() == samples[0].picture.tobytes()
    assert seen[0].picture is samples[0].picture
    assert seen[2].references[0].tobytes() == samples[0].picture.tobytes()
    assert (seen[1].name, seen[1].caption) == (samples[0].name, CAPTION)


class HostCopies(TorchFunctionMode):
    """Notes what would take a picture's values to the host, were it on a GPU."""

    NAMES = ("cpu", "numpy", "__array__", "tolist", "item", "__float__", "__int__", "__bool__", "__iter__")

    def __init__(self, num_least: int) -> None:
        super().__init__()
        self.num_least, self.found = num_least, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, values = getattr(function, "__name__", ""), (*args[1:], *(kwargs or {}).values())
        is_copy = name in self.NAMES or (name == "to" and any(isinstance(v, str) for v in values))
        if is_copy and isinstance(args[0], torch.Tensor) and args[0].numel() >= self.num_least:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_clip_leaves_pictures_on_their_device(clip_folder, samples):
    """Not one of them, nor what is made of them for the model; the scores alone are read."""
    reward, on_device = build("clip", clip_folder), list(map(put_on_device, samples))
    with HostCopies(32 * 32 * 3) as copies:
        reward.score(on_device)
    assert copies.found == []
    with HostCopies(len(samples)) as copies:
        reward.score(on_device)
    assert "cpu" in copies.found


def test_the_probe_finds_who_takes_pictures_to_the_host(samples):
    on_device = list(map(put_on_device, samples))
    with HostCopies(32 * 32 * 3) as copies:
        OracleReward().score(on_device)
    assert copies.found.count("cpu") == len(samples)
    with HostCopies(32 * 32 * 3) as copies:
        on_device[0].picture.to("cpu"), np.asarray(on_device[0].picture), on_device[0].picture.tolist()
    assert {"to", "__array__", "tolist"} <= set(copies.found)
    with HostCopies(32 * 32 * 3) as copies:
        bring_to_host(on_device[0])
    assert "cpu" in copies.found
