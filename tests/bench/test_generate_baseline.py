"""The baseline is the reference's algorithm: its recorded numbers, and the engine's pictures and texts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bench.generate.baseline import Baseline, Branches, draw_uniforms, guide
from bench.generate.forward import Cache
from realign.evals.golden import parse_part, relative_error
from realign.evals.parity import Golden
from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.noise import NoiseKey, token_uniforms
from realign.runtime.prepare import crop_picture
from realign.runtime.request import Prompt, Request
from realign.runtime.settings import GuidanceSettings, Settings, TextSettings
from realign.world.tasks import sample
from tests.parity.conftest import DEFAULT, load_golden

TOLERANCE = 1e-4  # the promise of `realign verify` in float32
FLOWS = ("no_cfg", "text_global", "both_global", "both_global_min", "both_channel", "both_text_channel")


@pytest.fixture(scope="module")
def golden() -> Golden:
    return load_golden(DEFAULT)


@pytest.fixture(scope="module")
def baseline(golden: Golden) -> Baseline:
    return Baseline(golden.model, crop_picture)


@pytest.fixture(scope="module")
def caches(golden: Golden, baseline: Baseline) -> dict[str, Cache]:
    """What the recorded contexts read."""
    parts = [parse_part(part) for part in golden.cases["context.full"]["layout"]]
    last_text = max(index for index, (kind, _, _) in enumerate(parts) if kind == "text")
    layouts = {
        "full": parts,
        "no_text": parts[:last_text],
        "no_image": [part for part in parts if part[0] == "text"],
    }
    caches = {}
    for name, layout in layouts.items():
        caches[name] = Cache()
        for kind, number, _ in layout:
            if kind == "text":
                baseline.reader.read_text(caches[name], golden.file["texts"][number])
            else:
                baseline.reader.read_picture(caches[name], golden.pictures[number])
    return caches


@pytest.mark.parametrize("name", ["full", "no_text", "no_image"])
def test_contexts_are_those_recorded(golden, caches, name):
    case, cache = golden.cases[f"context.{name}"], caches[name]
    assert (cache.length, cache.next_position) == (case["kv_len"], case["rope"])
    for layer, key_CKD in cache.keys.items():
        assert relative_error(key_CKD, golden.tensors[f"context.{name}.key.{layer}"]) < TOLERANCE
        assert (
            relative_error(cache.values[layer], golden.tensors[f"context.{name}.value.{layer}"]) < TOLERANCE
        )


@pytest.mark.parametrize("name", FLOWS)
def test_latents_are_those_recorded(golden, baseline, caches, name):
    flow, case = golden.cases["flow"], golden.cases[f"flow.{name}"]
    guidance = GuidanceSettings(
        case["cfg_text_scale"],
        case["cfg_img_scale"],
        tuple(case.get("cfg_interval", (0.0, 1.0))),
        case.get("cfg_renorm_type", "global"),
        case.get("cfg_renorm_min", 0.0),
    )
    settings = Settings(
        num_timesteps=case["num_timesteps"], timestep_shift=case["timestep_shift"], guidance=guidance
    )
    branches = Branches(
        caches["full"],
        caches["no_text"] if guidance.text_scale > 1 else None,
        caches["no_image"] if guidance.image_scale > 1 else None,
    )
    noise_LC = golden.tensors["flow.noise"]
    latent_LC = baseline.draw(branches, flow["height"], flow["width"], settings, noise_LC)
    assert relative_error(latent_LC, golden.tensors[f"flow.{name}.latent"]) < TOLERANCE
    if f"flow.{name}.image" in golden.tensors:
        image = baseline.decode(latent_LC, flow["height"], flow["width"])
        recorded = golden.tensors[f"flow.{name}.image"].int().numpy()
        assert np.abs(np.asarray(image).astype(int) - recorded).max() <= 1


@torch.no_grad()
def test_greedy_text_is_that_recorded(golden, baseline, caches):
    recorded = golden.tensors["text.tokens"].flatten().tolist()
    key, settings = NoiseKey(0, "", stream="text"), TextSettings(len(recorded) - 1)
    assert recorded[0] == golden.model.tokenizer.bos
    assert list(baseline.write_text(caches["full"].copy(), settings, key).ids) == recorded[1:]
    cache = caches["full"].copy()
    logits = torch.stack([baseline.reader.score_next(cache, token) for token in recorded])
    assert relative_error(logits, golden.tensors["text.logits"]) < TOLERANCE


def test_top_p_is_refused(baseline, caches):
    with pytest.raises(ValueError, match=r"top_p is 0\.9: the reference has no top-p"):
        baseline.write_text(caches["full"], TextSettings(top_p=0.9), NoiseKey(0, "", stream="text"))


def test_uniforms_are_the_engines():
    key = NoiseKey(7, "a request", stream="text")
    assert draw_uniforms(key, 5) == token_uniforms([key], 5)[0].tolist()


def test_guidance_without_renorm():
    cond_LC, text_LC = torch.ones(3, 4), torch.zeros(3, 4)
    settings = GuidanceSettings(4.0, 1.0, renorm="none")
    assert torch.equal(guide([cond_LC, text_LC], settings), torch.full((3, 4), 4.0))


def world_request(task: str, index: int, **settings) -> Request:
    drawn = sample(task, index, 0, "test")
    pictures = [Image.fromarray(reference.picture) for reference in drawn.references]
    return Request(f"{task} {index}", Prompt.build([*pictures, drawn.text]), 3, Settings(**settings))


@pytest.mark.parametrize(
    "wanted",
    [
        world_request("t2i", 1, num_timesteps=8),
        world_request("in_context", 11, num_timesteps=6),
        world_request("in_context", 1, num_timesteps=5, reasoning="ic-cot", text=TextSettings(256, 1.0)),
        world_request("edit", 2, num_timesteps=4, reasoning="think", text=TextSettings(6)),
        replace(world_request("in_context", 0, num_timesteps=3), prompt=Prompt.build(["a", "red star"])),
    ],
    ids=lambda request: f"{request.settings.reasoning}-{request.id}",
)
def test_makes_the_pictures_and_texts_of_the_engine(mini: Bagel, wanted: Request):
    (made,) = Engine(mini, PROGRAMS).run([wanted])
    ours = Baseline(mini).run(wanted)
    assert relative_error(ours.latent_LC, made.trajectory.latent_LC) < TOLERANCE
    assert ours.image.size == made.image.size
    assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(made.image)).max() <= 1
    assert ((ours.turn,) if ours.turn else ()) == made.trajectory.text_turns


def test_the_size_of_a_picture_is_the_engines(golden, baseline):
    prompt = Prompt.build([golden.images[0], "a mug", golden.images[1]])
    request = Request("size", prompt, settings=Settings(num_timesteps=2))
    (made,) = Engine(golden.model, PROGRAMS, crop_picture).run([request])
    ours = baseline.run(request)
    assert ours.image.size == made.image.size
    assert relative_error(ours.latent_LC, made.trajectory.latent_LC) < TOLERANCE


def test_bfloat16_is_near(mini: Bagel):
    request = world_request("in_context", 1, num_timesteps=4)
    exact = Baseline(mini).run(request)
    narrow = Baseline(Bagel.from_pretrained("mini", dtype=torch.bfloat16)).run(request)
    assert narrow.latent_LC.dtype == torch.float32
    assert relative_error(narrow.latent_LC, exact.latent_LC) < 0.1


@pytest.fixture(scope="module")
def mini() -> Bagel:
    return Bagel.from_pretrained("mini")
