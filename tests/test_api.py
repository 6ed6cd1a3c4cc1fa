"""The Python entry: what it takes, and one clear error for what it does not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from realign.api import Generator, build_settings, load
from realign.model.bagel import Bagel
from realign.runtime.stages import KEPT_POSITIONS
from tests.runtime.conftest import CHECKPOINT


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(Bagel.from_pretrained(CHECKPOINT))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"steps": "5"}, "steps is '5': must be a whole number"),
        ({"steps": 5.5}, "steps is 5.5: must be a whole number"),
        ({"height": "64", "width": 64}, "height is '64': must be a whole number"),
        ({"text_guidance_scale": "4"}, "text_guidance_scale is '4': must be a number"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5: must be two numbers"),
        ({"guidance_interval": ("a", "b")}, "must be two numbers"),
        ({"reasoning": "deep"}, "reasoning is 'deep': must be one of none, think, ic-cot"),
        ({"num_images": 0}, "num_images is 0: must be a whole number, at least 1"),
        ({"batch_size": 0}, "batch_size is 0: must be a whole number, at least 1"),
        ({"seed": 1.5}, "seed is 1.5: must be a whole number, at least 0"),
        ({"seed": -1}, "seed is -1: must be"),
    ],
)
def test_an_option_that_cannot_be_used(generator: Generator, option: dict, said: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=said.replace("(", r"\(")):
            generator.generate(["a mug"], **option)


def test_numbers_of_numpy_are_numbers() -> None:
    settings = build_settings(steps=np.int64(5), temperature=np.float32(1), guidance_interval=[0, 1])
    assert settings.num_timesteps == 5
    assert settings.guidance.interval == (0, 1)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "a text of the prompt is empty"),
        (["a mug", " \n"], "a text of the prompt is empty"),
        ("a \ud800 mug", "is no Unicode"),
        (["a mug", np.zeros((40, 40, 3))], "must be text or a PIL image"),
        (["a mug", Image.new("RGB", (0, 5))], "is 0x5: it has no pixels"),
    ],
)
def test_a_prompt_that_cannot_be_used(generator: Generator, prompt: object, said: str) -> None:
    with pytest.raises(ValueError, match=rf"\Aprompt 1: .*{said}") as raised:
        generator.generate(["a mug", prompt])
    assert len(str(raised.value).splitlines()) == 1


def test_more_text_than_the_model_reads(generator: Generator, capfd: pytest.CaptureFixture[str]) -> None:
    limit = generator.model.config.llm.max_position_embeddings - KEPT_POSITIONS
    with pytest.raises(ValueError, match=rf"tokens, the model reads at most {limit}: shorten it"):
        generator.generate(["mug " * (2 * limit)], height=16, width=16)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "tpu"}, "device 'tpu' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
        ({"dtype": "float64"}, "dtype is 'float64': must be one of float32, bfloat16"),
        ({"dtype": torch.int32}, "dtype is 'torch.int32': must be one of float32, bfloat16"),
    ],
)
def test_a_device_or_dtype_that_cannot_be_used(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        load(CHECKPOINT, **options)
    assert len(str(raised.value).splitlines()) == 1


def test_a_dtype_of_torch() -> None:
    assert load(CHECKPOINT, device="cpu", dtype=torch.bfloat16).model.dtype is torch.bfloat16
