"""Configs: the published files as they are, the round trip, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from realign.model.config import AutoencoderConfig, BagelConfig, LLMConfig, ResizeRule

# The sizes of BAGEL-7B-MoT, as its llm_config.json and vit_config.json give them.
BAGEL_7B_LLM = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
BAGEL_7B_VIT = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The configs of the published folder: `config.json` names the model and has a comma too many."""
    (tmp_path / "config.json").write_text('{\n  "name": [\n    "BAGEL-7B-MoT"\n  ],\n}')
    (tmp_path / "llm_config.json").write_text(json.dumps(BAGEL_7B_LLM))
    (tmp_path / "vit_config.json").write_text(json.dumps(BAGEL_7B_VIT))
    return tmp_path


def test_published_configs(published: Path) -> None:
    config = BagelConfig.load(published)
    assert config.name == "BAGEL-7B-MoT"
    assert config.llm == LLMConfig(152064, 3584, 18944, 28, 28, 4, rope_theta=1e6)
    assert config.llm.qk_norm
    assert config.llm.head_dim == 128
    assert config.vit.num_hidden_layers == 26
    assert config.vit.num_positions == config.vit_max_num_patch_per_side**2 == 4900
    assert config.vit.patch_dim == 588
    assert config.autoencoder == AutoencoderConfig()
    assert (config.latent_stride, config.latent_dim, config.max_latent_size) == (16, 64, 64)
    assert config.vae_resize == ResizeRule(1024, 512, 16)
    assert config.vit_resize == ResizeRule(980, 224, 14)
    assert config.default_image_size == (1024, 1024)


def test_config_json_may_hold_everything_or_be_absent(published: Path) -> None:
    from_files = BagelConfig.load(published)
    (published / "config.json").unlink()
    assert BagelConfig.load(published) == replace(from_files, name="bagel")
    for name in ("llm_config.json", "vit_config.json"):
        (published / name).unlink()
    main = {"llm_config": BAGEL_7B_LLM, "vit_config": {**BAGEL_7B_VIT, "num_hidden_layers": 26}}
    (published / "config.json").write_text(json.dumps(main))
    assert BagelConfig.load(published) == replace(from_files, name="bagel")


def test_golden_counts_agree(checkpoint: Path) -> None:
    assert json.loads((checkpoint / "vit_config.json").read_text())["num_hidden_layers"] == 3
    assert BagelConfig.load(checkpoint).vit.num_hidden_layers == 2


def test_save_and_load(small_config: BagelConfig, tmp_path: Path) -> None:
    config = replace(
        small_config,
        vae_resize=ResizeRule(64, 32, 4),
        default_image_size=(64, 48),
        reasoning_modes=("none", "ic-cot"),
        interpolate_pos=True,
        size_follows_picture=False,
        name="mini",
        llm=replace(small_config.llm, tie_word_embeddings=True, qk_norm=False),
    )
    config.save(tmp_path)
    assert BagelConfig.load(tmp_path) == config


def test_the_two_words_about_the_autoencoder(published: Path) -> None:
    flux = {"downsample": 8, "z_channels": 16, "ch_mult": [1, 2, 4, 4]}
    (published / "config.json").write_text(json.dumps({"vae_config": flux}))
    assert BagelConfig.load(published).autoencoder == AutoencoderConfig()
    (published / "ae_config.json").write_text(json.dumps({"z_channels": 8}))
    with pytest.raises(
        ValueError, match=r"ae_config\.json: z_channels is 8, but config\.json's vae_config says 16"
    ):
        BagelConfig.load(published)


def test_newer_transformers_rope_is_read(published: Path) -> None:
    llm = {key: value for key, value in BAGEL_7B_LLM.items() if key != "rope_theta"}
    llm["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    (published / "llm_config.json").write_text(json.dumps(llm))
    assert BagelConfig.load(published).llm.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("llm_config.json", {"hidden_size": None}, r"llm_config.json: missing hidden_size"),
        ("llm_config.json", {"hidden_size": "3584"}, r"llm_config.json: hidden_size is '3584', expected int"),
        ("llm_config.json", {"hidden_size": 3586}, r"hidden_size 3586 must be a multiple of"),
        ("llm_config.json", {"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        ("llm_config.json", {"head_dim": 64}, r"head_dim 64"),
        ("llm_config.json", {"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported"),
        ("llm_config.json", {"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling .* is not supported"),
        ("llm_config.json", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_type 'yarn' is not supported"),
        ("llm_config.json", {"layer_module": "Qwen2DecoderLayer"}, r"layer_module .* is not supported"),
        ("vit_config.json", {"patch_size": 14.0}, r"vit_config.json: patch_size is 14.0"),
        ("vit_config.json", {"rope": True}, r"rope True is not supported"),
        ("config.json", {"visual_gen": False}, r"visual_gen False is not supported"),
        ("config.json", {"vae_config": {"downsample": 16}}, r"config.json: .*downsample 16 does not fit"),
        ("config.json", {"vae_config": "flux"}, r"vae_config is 'flux', expected an object"),
        ("config.json", {"vae_resize": {"max_size": 64}}, r"missing vae_resize.min_size"),
        ("config.json", {"reasoning_modes": ["daydream"]}, r"unknown reasoning modes \['daydream'\]"),
        ("config.json", {"default_image_size": [64]}, r"default_image_size"),
        ("ae_config.json", {"downsample": 4}, r"ae_config.json: .*downsample 4 does not fit"),
        ("ae_config.json", {"ch": 100}, r"channels \d+ must be a multiple of norm_num_groups 32"),
    ],
)
def test_refused(published: Path, file: str, change: dict, message: str) -> None:
    path = published / file
    content = {} if file in ("config.json", "ae_config.json") else json.loads(path.read_text())
    path.write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        BagelConfig.load(published)


def test_broken_json_names_file_and_line(published: Path) -> None:
    (published / "llm_config.json").write_text('{\n  "hidden_size": ,\n}')
    with pytest.raises(ValueError, match=r"llm_config.json: not valid JSON.*line 2"):
        BagelConfig.load(published)
    (published / "llm_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"llm_config.json: expected a JSON object, found list"):
        BagelConfig.load(published)


def test_a_file_that_is_no_text_is_named(published: Path) -> None:
    (published / "llm_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"llm_config\.json: not UTF-8 text: .* at byte 0"):
        BagelConfig.load(published)


def test_folder_without_configs(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"neither llm_config\.json nor"):
        BagelConfig.load(tmp_path)
    shutil.copy(checkpoint / "llm_config.json", tmp_path)
    with pytest.raises(ValueError, match=r"neither vit_config\.json nor"):
        BagelConfig.load(tmp_path)
