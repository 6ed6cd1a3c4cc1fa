"""The mini CLIP's trainer: groups, the loss, a run that learns, goes on after a kill, and gives a folder that
open_clip alone loads.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from realign.libraries import import_open_clip
from realign.model.bagel import Bagel
from realign.world.language import read_caption, write_caption
from realign.world.oracle import judge_caption, read_pictures
from realign.world.render import render
from realign.world.scene import MAX_OBJECTS, sample_scene
from train.clip import Recipe, SceneReader, Trainer, contrast, list_contents, load_recipe
from train.clip_pictures import PictureOptions, Pictures, draw_caption, draw_scenes, through_autoencoder

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
TINY = Recipe(
    PictureOptions(groups=2, variants=4, captions=2, pool=4), warmup_steps=2, learning_rate=3e-3,
    vision={"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
    text={"context_length": 40, "width": 32, "heads": 2, "layers": 1, "pool_type": "argmax"}, embed_dim=32,
)  # fmt: skip


def test_groups_are_scenes_with_variants_that_captions_can_name():
    rng, options = np.random.default_rng(0), PictureOptions()
    for _ in range(40):
        scenes = draw_scenes(rng, options)
        assert len(scenes) == options.variants
        assert scenes[0].split == "train"
        assert all(scene != scenes[0] for scene in scenes[1:])
        assert all(len(scene.objects) <= MAX_OBJECTS for scene in scenes[: options.captions])
        assert all(read_caption(draw_caption(rng, scene)) == scene for scene in scenes[: options.captions])


def test_decoded_pictures_still_show_their_scenes():
    rng = np.random.default_rng(0)
    autoencoder = Bagel.from_pretrained("mini", "cpu", torch.float32).autoencoder
    scenes = [sample_scene(rng, 2) for _ in range(8)]
    pictures = np.stack([render(scene) for scene in scenes])
    near, far = (through_autoencoder(autoencoder, pictures, noise, rng) for noise in (0.0, 0.5))
    right = [judge_caption(r, s).all_right for r, s in zip(read_pictures(near), scenes, strict=True)]
    assert sum(right) >= 7
    difference = [np.abs(made.astype(float) - pictures).mean() for made in (near, far)]
    assert difference[0] < difference[1] < 25
    options = replace(TINY.pictures, fresh=1, pool=16)
    assert len(Pictures(options, autoencoder).draw(rng)) == options.groups


def test_a_reader_is_asked_what_a_scene_shows():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, 1 + number % 3) for number in range(64)]
    contents = torch.tensor([list_contents(scene) for scene in scenes])
    assert len({tuple(row) for row in contents.tolist()}) == len({scene.key for scene in scenes})
    assert (contents >= 0).all()
    assert (contents < torch.tensor(SceneReader.NUM_ANSWERS)).all()
    assert [int((row[1::3] > 0).sum()) for row in contents] == [len(scene.objects) for scene in scenes]
    reader = SceneReader(8)
    with torch.no_grad():
        reader.answers.weight.zero_()
        reader.answers.bias.zero_()
    expected = sum(math.log(count) for count in SceneReader.NUM_ANSWERS) / SceneReader.NUM_FACTS
    assert float(reader.loss(torch.randn(64, 8), contents).detach()) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_clips_without_equal_scenes():
    torch.manual_seed(0)
    picture_ND, caption_MD = torch.randn(5, 8), torch.randn(3, 8)
    own_M, scale = torch.tensor([0, 2, 4]), torch.tensor(7.0)
    is_equal_MN = torch.zeros(3, 5, dtype=torch.bool)
    is_equal_MN[[0, 1, 2], own_M] = True
    is_equal_MN[0, 1] = is_equal_MN[0, 4] = is_equal_MN[2, 0] = True
    cosine = torch.nn.functional.cosine_similarity(caption_MD[:, None], picture_ND[None], dim=-1) * scale
    expected = 0.0
    for m, n in enumerate(own_M.tolist()):
        others = [i for i in range(5) if i == n or not is_equal_MN[m, i]]
        captions = [k for k in range(3) if k == m or not is_equal_MN[k, n]]
        expected -= (cosine[m, n] - cosine[m, others].logsumexp(0)) / 6
        expected -= (cosine[m, n] - cosine[captions, n].logsumexp(0)) / 6
    torch.testing.assert_close(contrast(picture_ND, caption_MD, own_M, is_equal_MN, scale), expected)


def test_the_rate_warms_up_and_decays():
    recipe = Recipe(learning_rate=1.0, warmup_steps=10, minutes=1.0)
    assert recipe.rate(0, 0.0) == pytest.approx(0.1)
    assert recipe.rate(100, 30.0) == pytest.approx(0.505)
    assert recipe.rate(100, 90.0) == pytest.approx(0.01)


def test_a_run_learns_and_goes_on_where_it_was(tmp_path):
    recipe = replace(
        TINY, pictures=replace(TINY.pictures, decoded=0.0, fresh=0)
    )  # a step is then a function of its number
    trainer = Trainer(recipe, tmp_path)
    losses = [trainer.step(0, 0.0) for _ in range(16)]
    assert losses[-1] < losses[0] - 0.3
    trainer.save(16, 1.5)
    again = Trainer(recipe, tmp_path)
    assert again.resume() == (16, 1.5)
    for ours, theirs in zip(*(t.trained.state_dict().values() for t in (trainer, again)), strict=True):
        assert torch.equal(ours, theirs)
    first, second = (
        sorted(s["exp_avg"].sum().item() for s in t.optimizer.state.values()) for t in (trainer, again)
    )
    assert first == second


def test_open_clip_alone_loads_the_folder(tmp_path):
    trainer = Trainer(TINY, tmp_path)
    trainer.save_model()
    open_clip, name = import_open_clip(), f"local-dir:{tmp_path / 'model'}"
    model, _, _ = open_clip.create_model_and_transforms(name)
    assert all(map(torch.equal, model.state_dict().values(), trainer.model.state_dict().values()))
    caption = write_caption(sample_scene(np.random.default_rng(0), 3).objects, "snow")
    ids = open_clip.get_tokenizer(name)([caption, caption.upper(), "a dodo"])
    assert torch.equal(ids[0], ids[1])
    unknown, end = 1, ids.max()
    assert unknown not in ids[0]
    assert ids[2].tolist()[1:4] == [ids[0].tolist()[1], unknown, end]
    assert math.isfinite(float(model.encode_text(ids).detach().sum()))


def test_recipes(tmp_path):
    assert load_recipe(RECIPES / "clip-mini.toml").minutes >= 10
    path = tmp_path / "wrong.toml"
    path.write_text("learning_rte = 1.0\n")
    with pytest.raises(ValueError, match="unknown 'learning_rte'"):
        load_recipe(path)
    path.write_text("[pictures]\ngropus = 1\n")
    with pytest.raises(ValueError, match="unknown 'gropus'"):
        load_recipe(path)
