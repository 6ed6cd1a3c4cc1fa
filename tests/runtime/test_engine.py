"""The engine's sizes, refusals and trajectories; the Python entry; prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

import realign
from realign.api import Generator, build_requests, build_settings, load
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.noise import normal
from realign.runtime.prepare import crop_picture
from realign.runtime.request import ImagePart, Prompt, Request, TextPart
from realign.runtime.settings import GuidanceSettings, NoiseSettings, Settings, TextSettings

from .conftest import CHECKPOINT

SMALL = Settings(16, 24, num_timesteps=4)
RED = Image.new("RGB", (40, 16), "red")


def test_no_requests_is_no_work(engine):
    assert engine.run([]) == []


def test_the_trajectory_is_what_happened(model):
    engine = Engine(model, PROGRAMS, prepare=crop_picture, keep_steps=True)
    shorter = replace(SMALL, num_timesteps=3)
    requests = [
        Request("a", Prompt.build("mug"), 5, shorter),
        Request("b", Prompt.build([RED, "lamp"]), 5, SMALL),
    ]
    for sample, num_steps in zip(engine.run(requests), (2, 3), strict=True):
        steps = sample.trajectory.steps
        assert len(steps) == num_steps + 1
        assert torch.equal(steps[0], normal(sample.trajectory.noise_key, sample.trajectory.latent_LC.shape))
        assert torch.equal(steps[-1], sample.trajectory.latent_LC)
        assert sample.image.size == (24, 16)


def test_sizes_follow_the_settings_then_the_picture_then_the_model(model, monkeypatch):
    engine = Engine(model, PROGRAMS, prepare=crop_picture)
    free = replace(SMALL, height=None, width=None)
    prompt = Prompt.build([Image.new("RGB", (16, 16)), RED, "mug"])
    assert engine.run([Request("a", prompt, settings=free)])[0].image.size == (40, 16)
    assert engine.run([Request("a", prompt, settings=SMALL)])[0].image.size == (24, 16)
    own = replace(model.config, default_image_size=(32, 8), size_follows_picture=False)
    monkeypatch.setattr(model, "config", own)
    assert engine.run([Request("a", prompt, settings=free)])[0].image.size == (8, 32)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            replace(SMALL, reasoning="irg"),
            "request 'bad': no program for reasoning 'irg': there is none, think, ic-cot",
        ),
        (replace(SMALL, height=20), "request 'bad': height 20 must be a multiple of 8 from 8 to 128"),
        (replace(SMALL, width=136), "request 'bad': width 136 must be a multiple of 8 from 8 to 128"),
        (Settings(num_timesteps=2), "request 'bad': height 1024 must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_any_work(engine, monkeypatch, settings, complaint):
    monkeypatch.setattr("realign.runtime.reader.extend", lambda *args: pytest.fail("work was begun"))
    requests = [
        Request("good", Prompt.build("mug"), settings=SMALL),
        Request("bad", Prompt.build("mug"), 0, settings),
    ]
    with pytest.raises(ValueError, match=complaint):
        engine.run(requests)


def test_load_and_generate():
    generator = load(CHECKPOINT)
    generator.engine.prepare = crop_picture  # its resize rules are for a larger model
    options = {"height": 16, "width": 16, "steps": 3, "reasoning": "think", "max_reasoning_tokens": 5}
    samples = generator.generate(["a mug", [RED, "a lamp"]], num_images=2, seed=3, temperature=1.0, **options)
    assert [sample.request.id for sample in samples] == ["00000/0", "00000/1", "00001/0", "00001/1"]
    assert samples[0].reasoning.text != samples[1].reasoning.text
    again = generator.generate(["a mug"], seed=3, batch_size=1, temperature=1.0, **options)
    assert again[0].reasoning == samples[0].reasoning
    latents = [sample.trajectory.latent_LC for sample in (again[0], samples[0])]
    torch.testing.assert_close(*latents, rtol=0, atol=1e-5)
    assert isinstance(realign.load(str(CHECKPOINT), dtype="bfloat16"), Generator)


def test_an_untrained_mode_is_a_warning(model):
    generator = Generator(model)
    with pytest.warns(UserWarning, match="not trained for reasoning 'ic-cot'"):
        generator.generate(["mug"], height=16, width=16, steps=2, reasoning="ic-cot", max_reasoning_tokens=1)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: build_settings(stepz=3), "unknown option 'stepz'"),
        (lambda: build_settings(height=16), "give both, or neither"),
        (lambda: build_settings(temperature=-1.0), "temperature is -1.0"),
        (lambda: build_settings(top_p=0.0), "top_p is 0.0"),
        (lambda: build_settings(max_reasoning_tokens=0), "max_tokens is 0"),
        (lambda: build_settings(guidance_renorm="local"), "guidance renorm is 'local'"),
        (lambda: build_settings(guidance_renorm_min=2.0), "renorm_min is 2.0"),
        (lambda: build_settings(guidance_interval=(1.0, 0.4)), "guidance interval is"),
        (lambda: build_settings(text_guidance_scale=float("nan")), "text_scale is nan"),
        (lambda: build_settings(steps=1), "num_timesteps is 1: must be at least 2"),
        (lambda: build_settings(steps=True), "steps is True: must be a whole number"),
        (lambda: build_settings(timestep_shift=0.0), "timestep shift is 0.0: must be a positive number"),
        (lambda: Settings(num_timesteps=1), "num_timesteps is 1"),
        (lambda: build_requests("a mug", SMALL), "must be a list of prompts"),
        (lambda: build_requests(["a mug", [RED]], SMALL), "prompt 1: the prompt has no text"),
        (lambda: build_requests([3], SMALL), "prompt 0: prompt is 3"),
        (lambda: build_requests([["a", 3]], SMALL), "prompt part is 3"),
        (lambda: build_requests([[{"image": "a.png"}]], SMALL), "prompt part 'image' is 'a.png'"),
        (lambda: load(CHECKPOINT, dtype="float8"), "dtype is 'float8'"),
    ],
)
def test_what_users_get_wrong_is_named(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


def test_prompts_are_built_from_all_forms():
    parts = Prompt.build(["a", RED, {"text": "b"}, {"image": RED}, TextPart("c"), ImagePart(RED)]).parts
    assert [part.text if isinstance(part, TextPart) else part.image for part in parts] == [
        "a",
        RED,
        "b",
        RED,
        "c",
        RED,
    ]
    prompt = Prompt.build("a")
    assert Prompt.build(prompt) is prompt


def test_settings_have_the_documented_defaults():
    assert build_settings() == Settings(
        None,
        None,
        "none",
        50,
        3.0,
        GuidanceSettings(4.0, 2.0, (0.4, 1.0), "global", 0.0, for_text_prompts=False),
        TextSettings(512, 0.0, 1.0),
    )


def test_a_window_of_noise_may_be_a_list(engine):
    noise = NoiseSettings("cps", 0.5, [0, 1])
    assert noise == NoiseSettings("cps", 0.5, (0, 1))
    assert len(engine.run([Request("a", Prompt.build("mug"), settings=replace(SMALL, noise=noise))])) == 1


def test_what_is_read_and_written_has_positions(model, monkeypatch):
    """System text and pictures count; what is written is cut to what is left, and holds no more for it."""
    engine, text = Engine(model, PROGRAMS, prepare=crop_picture), TextSettings(10**9)
    request = Request("a", Prompt.build([RED, "mug"]), settings=replace(SMALL, reasoning="think", text=text))
    system = len(model.tokenizer.encode(PROGRAMS["think"].system_text))
    read = system + len(model.tokenizer.encode("mug")) + 2 * 3

    def limit(positions):
        llm = replace(model.config.llm, max_position_embeddings=positions)
        monkeypatch.setattr(model, "config", replace(model.config, llm=llm))

    limit(read + 4 + 2)
    (sample,) = engine.run([request])
    assert len(sample.trajectory.text_turns[0].ids) <= 2
    limit(read + 3)
    with pytest.raises(ValueError, match=f"has {read} tokens, the model reads at most {read - 1}"):
        engine.run([request])
