"""The CLIP rewards, against open_clip's and transformers' own ways."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from realign.libraries import import_open_clip, mend_torchvision
from realign.rewards.base import RewardError
from realign.rewards.clip import ClipEncoder, ClipReward, ImageSimilarityReward
from realign.rewards.clip_models import OpenClip, load_clip
from realign.rewards.spec import build_reward
from tests.rewards.conftest import draw_picture, make_sample

CPU = torch.device("cpu")
CAPTIONS = ["a large red circle", "a small blue bar at the top", "a green ring on a beach background"]
PICTURES = [draw_picture(0), draw_picture(1, (90, 70)), draw_picture(2, (64, 100))]


@pytest.fixture(scope="module")
def encoder(clip_folder: Path) -> ClipEncoder:
    return ClipEncoder(str(clip_folder), "cpu")


def make_samples() -> list:
    return [
        make_sample(i, picture=p, caption=c) for i, (p, c) in enumerate(zip(PICTURES, CAPTIONS, strict=True))
    ]


@torch.no_grad()
def score_by_open_clip(folder: Path, pictures: list, captions: list) -> torch.Tensor:
    open_clip, name = import_open_clip(), f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    pixels = torch.stack([preprocess(picture) for picture in pictures])
    text = model.eval().encode_text(open_clip.get_tokenizer(name)(captions))
    return cosine_similarity(model.encode_image(pixels), text)


def test_it_is_open_clips_cosine(clip_folder, encoder):
    score = ClipReward("x", encoder=encoder).score(make_samples())
    expected = score_by_open_clip(clip_folder, PICTURES, CAPTIONS)
    assert score.dtype == torch.float32
    assert expected.std() > 0.05
    torch.testing.assert_close(score, expected, atol=2e-6, rtol=0)


def test_tensors_score_as_the_pictures_they_are_saved_as(encoder):
    reward, samples = ClipReward("x", encoder=encoder), make_samples()
    arrays = [torch.from_numpy(np.array(sample.picture)) for sample in samples]
    floats = [(array.permute(2, 0, 1) + 0.5) / 255 * 2 - 1 for array in arrays]  # amid each level
    mixed = [
        make_sample(0, picture=floats[0], caption=CAPTIONS[0]),
        make_sample(1, picture=arrays[1], caption=CAPTIONS[1]),
        make_sample(2, picture=floats[2], caption=CAPTIONS[2]),
    ]
    torch.testing.assert_close(reward.score(mixed), reward.score(samples), atol=1e-6, rtol=0)


def test_without_a_caption_the_prompt_counts_and_without_both_it_fails(encoder):
    reward = ClipReward("mine", encoder=encoder)
    with_caption = make_sample(0, caption=CAPTIONS[0])
    torch.testing.assert_close(
        reward.score([make_sample(0, prompt=CAPTIONS[0])]), reward.score([with_caption]), atol=0, rtol=0
    )
    with pytest.raises(RewardError, match="reward clip:mine: sample 's0': has neither"):
        reward.score([make_sample(0, prompt=" ")])


def test_a_malformed_reasoning_scores_nothing_by_another_text(encoder):
    reward = ClipReward("x", encoder=encoder)
    good, malformed = make_samples()[1], make_sample(1, reasoning="<out_caption>", is_malformed=True)
    score = reward.score([malformed, good, malformed])
    assert score[[0, 2]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(score[1:2], reward.score([good]), atol=1e-6, rtol=0)
    assert reward.score([malformed]).tolist() == [0.0]


def test_no_samples_no_scores(encoder):
    assert ClipReward("x", encoder=encoder).score([]).shape == (0,)
    assert ImageSimilarityReward("x", encoder=encoder).score([]).shape == (0,)


def test_texts_are_encoded_once_and_few_are_kept(clip_folder, monkeypatch):
    encoder, asked = ClipEncoder(str(clip_folder), "cpu", captions_kept=2), []
    tokenize = encoder.model.tokenize
    monkeypatch.setattr(encoder.model, "tokenize", lambda texts: asked.extend(texts) or tokenize(texts))
    a, b, c = CAPTIONS
    first = encoder.encode_texts([a, b, a])
    assert asked == [a, b]
    torch.testing.assert_close(first[0], first[2], atol=0, rtol=0)
    encoder.encode_texts([a, c])  # b, which was used least lately, makes room
    encoder.encode_texts([a, c])
    assert asked == [a, b, c]
    torch.testing.assert_close(
        encoder.encode_texts([b, a, c]), encoder.encode_texts([b, a, c]), atol=0, rtol=0
    )
    assert asked[3:] == [b, b], "three texts at a time do not fit the two that are kept, but are right"


def test_long_captions_are_said_with_their_count(clip_folder):
    encoder = ClipEncoder(str(clip_folder), "cpu")
    fits, long = "a " * 10, "a " * 11  # 12 tokens, both ends included
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode_texts([fits])
    with pytest.warns(UserWarning, match=r"2 of 3 captions have more than the 12 tokens"):
        encoder.encode_texts([long, "a", long + "circle"])
    assert encoder.num_truncated == 2


def test_image_similarity_is_the_mean_over_the_references(clip_folder, encoder):
    reward = ImageSimilarityReward("x", encoder=encoder)
    samples = [make_sample(0, references=PICTURES[1:]), make_sample(1, references=[draw_picture(1)])]
    with torch.no_grad():
        rows = encoder.encode_pictures([draw_picture(0), *PICTURES[1:]])
    expected = cosine_similarity(rows[:1], rows[1:]).mean()
    torch.testing.assert_close(reward.score(samples), torch.tensor([float(expected), 1.0]), atol=2e-6, rtol=0)
    with pytest.raises(RewardError, match="sample 's3': has no reference"):
        reward.score([samples[0], make_sample(3)])


def test_rewards_of_one_spec_share_a_model(clip_folder):
    clip, similarity = build_reward(f"clip:{clip_folder}+image_similarity:{clip_folder}*.5", "cpu").terms
    assert clip[0].encoder is similarity[0].encoder
    assert similarity[1] == 0.5


def test_in_bfloat16_scores_are_near(clip_folder, encoder):
    encoder16 = ClipEncoder(str(clip_folder), "cpu")
    encoder16.model = OpenClip("x", f"local-dir:{clip_folder}", None, CPU, torch.bfloat16)
    assert encoder16.encode_pictures(PICTURES).dtype == torch.bfloat16
    near = ClipReward("x", encoder=encoder16).score(make_samples())
    torch.testing.assert_close(
        near, ClipReward("x", encoder=encoder).score(make_samples()), atol=0.02, rtol=0
    )


def test_a_name_with_a_file(clip_folder, encoder, tmp_path):
    open_clip = import_open_clip()
    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    del config["text_cfg"]["hf_tokenizer_name"], config["text_cfg"]["tokenizer_kwargs"]
    (tmp_path / "realign-tiny.json").write_text(json.dumps({**config, "custom_text": False}))
    open_clip.add_model_config(tmp_path)
    model = load_clip(f"realign-tiny:{clip_folder / 'open_clip_model.safetensors'}", CPU)
    assert model.preprocess["size"] == (32, 32)
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode_pictures(pixels), encoder.model.encode_pictures(pixels))
    ids, is_cut = model.tokenize(["a dog", "a dog " * 20])
    assert ids.shape == (2, 12)
    assert is_cut.tolist() == [False, True]


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mend_torchvision()
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("transformers-clip")
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=10
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **common,
        "vocab_size": len(words),
        "max_position_embeddings": 10,
        "eos_token_id": 1,
        "bos_token_id": 0,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config={**common, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_a_transformers_folder(transformers_folder):
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    texts = ["a red star", "blue"]
    score = ClipReward(str(transformers_folder), "cpu").score(
        [make_sample(i, picture=PICTURES[i], caption=text) for i, text in enumerate(texts)]
    )
    model = CLIPModel.from_pretrained(transformers_folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(transformers_folder)(PICTURES[:2], return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(transformers_folder)(
        texts, padding=True, return_tensors="pt", truncation=True
    )
    with torch.no_grad():
        expected = model(**pixels, **tokens).logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(score, expected, atol=2e-6, rtol=0)
    with pytest.warns(UserWarning, match="1 of 1 captions"):
        ClipEncoder(str(transformers_folder), "cpu").encode_texts(["abc def ghi jkl"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("other.json", "{}", "neither open_clip_config.json nor config.json"),
        ("config.json", "{}", "no preprocessor_config.json"),
        ("open_clip_config.json", "{", "cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_clip(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"^clip [^\n]*$") as error:
        load_clip(str(tmp_path), CPU)
    assert said in str(error.value)


def test_resizing_that_would_differ_is_refused(clip_folder, tmp_path):
    for path in clip_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["interpolation"] = "bilinear"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="bilinear"):
        load_clip(str(tmp_path), CPU)


def test_grey_pictures_are_scored_as_colour(encoder):
    grey = draw_picture(3).convert("L")
    rows = encoder.encode_pictures([grey, Image.merge("RGB", [grey] * 3)])
    torch.testing.assert_close(rows[0], rows[1], atol=0, rtol=0)
