"""Checkpoints: names, exact round trips, strictness, one copy in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from realign.model.bagel import Bagel
from realign.model.config import BagelConfig
from realign.model.weights import list_parts

from .test_config import BAGEL_7B_LLM, BAGEL_7B_VIT


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the golden checkpoint to break."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    return copy


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_published_names_are_the_golden_ones(
    golden_model: Bagel, checkpoint: Path, golden_json: dict
) -> None:
    parts = list_parts(golden_model)
    files = [load_file(checkpoint / name) for name in ("ema.safetensors", "ae.safetensors")]
    assert sorted(parts) == sorted([*files[0], *files[1]])
    ours = {name for name, p in golden_model.named_parameters() if p.requires_grad}
    trained = {name for name, part in parts.items() if part.parameter in ours}
    assert set(golden_json["cases"]["train"]["grad_norms"]) <= trained


def test_bagel_7b_layout(tmp_path: Path) -> None:
    """The whole published model, without its 29 GB: names and sizes."""
    (tmp_path / "llm_config.json").write_text(json.dumps(BAGEL_7B_LLM))
    (tmp_path / "vit_config.json").write_text(json.dumps(BAGEL_7B_VIT))
    with torch.device("meta"):
        model = Bagel(BagelConfig.load(tmp_path))
    state = model.state_dict()
    shapes = {name: tuple(part.of(state).shape) for name, part in list_parts(model).items()}
    layer = "language_model.model.layers.27"
    assert shapes[f"{layer}.self_attn.k_proj_moe_gen.weight"] == (512, 3584)
    assert shapes[f"{layer}.self_attn.q_norm.weight"] == (128,)
    assert shapes[f"{layer}.mlp_moe_gen.down_proj.weight"] == (3584, 18944)
    assert shapes["language_model.lm_head.weight"] == (152064, 3584)
    assert shapes["vit_model.vision_model.embeddings.patch_embedding.weight"] == (1152, 588)
    assert shapes["vit_model.vision_model.embeddings.position_embedding.weight"] == (4900, 1152)
    assert "vit_model.vision_model.encoder.layers.26.mlp.fc1.weight" not in shapes
    assert shapes["latent_pos_embed.pos_embed"] == (4096, 3584)
    assert shapes["vit_pos_embed.pos_embed"] == (4900, 3584)
    assert shapes["vae2llm.weight"] == (3584, 64)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert sum(1 for name in shapes if name.startswith(("encoder.", "decoder."))) == 244
    billions = sum(tensor.numel() for tensor in model.state_dict().values()) / 1e9
    assert 14.6 < billions < 14.9  # "14B total"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_is_bit_exact(small_model: Bagel, tmp_path: Path, dtype: torch.dtype) -> None:
    small_model.to(dtype).save_pretrained(tmp_path)
    again = Bagel.from_pretrained(tmp_path, dtype=dtype)
    assert again.config == small_model.config
    assert again.dtype == dtype
    assert again.tokenizer.encode("a red mug") == small_model.tokenizer.encode("a red mug")
    assert not again.training
    state, expected = again.state_dict(), small_model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == {
        "vit_position.pos_embed",
        "latent_position.pos_embed",
    }
    assert not list(tmp_path.glob(".*")), "no half-written file stays"


def test_golden_files_are_reproduced(golden_model: Bagel, checkpoint: Path, tmp_path: Path) -> None:
    golden_model.save_pretrained(tmp_path)
    for name in ("ema.safetensors", "ae.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(checkpoint / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_fused_weights_are_the_published_ones_one_after_the_other(
    golden_model: Bagel, checkpoint: Path
) -> None:
    published = load_file(checkpoint / "ema.safetensors")
    layer = "language_model.model.layers.1"
    for expert, mark in (("und", ""), ("gen", "_moe_gen")):
        ours = getattr(golden_model.decoder.layers[1], expert)
        for leaf in ("weight", "bias"):
            parts = [published[f"{layer}.self_attn.{name}_proj{mark}.{leaf}"] for name in "qkv"]
            assert torch.equal(getattr(ours.qkv_proj, leaf), torch.cat(parts))
        parts = [published[f"{layer}.mlp{mark}.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(ours.gate_up_proj.weight, torch.cat(parts))


def test_saving_over_what_was_loaded(folder: Path) -> None:
    model = Bagel.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = Bagel.from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_loaded_weights_do_not_hang_on_the_file(folder: Path, golden_model: Bagel) -> None:
    model = Bagel.from_pretrained(folder)
    size = (folder / "ema.safetensors").stat().st_size
    with (folder / "ema.safetensors").open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))
    expected = golden_model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_fresh_model(small_model: Bagel) -> None:
    for layer in small_model.decoder.layers:
        und, gen = layer.und.state_dict(), layer.gen.state_dict()
        assert all(torch.equal(und[name], gen[name]) for name in und)
        assert 0.015 < layer.und.qkv_proj.weight.std() < 0.025
        assert not layer.und.qkv_proj.bias.any()
    assert not small_model.llm2vae.weight.any()
    assert all(p.isfinite().all() for p in small_model.parameters())


def _shard(folder: Path, index_name: str) -> dict[str, str]:
    """Split ema.safetensors in two; gives the weight map."""
    tensors = load_file(folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, folder / shard)
    (folder / index_name).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return shard_of


@pytest.mark.parametrize("index_name", ["model.safetensors.index.json", "other.safetensors.index.json"])
def test_sharded(folder: Path, golden_model: Bagel, index_name: str) -> None:
    _shard(folder, index_name)
    state, expected = Bagel.from_pretrained(folder).state_dict(), golden_model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_broken_shards(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    shard_of = _shard(folder, index.name)
    first, name = sorted(shard_of.items())[0][1], sorted(shard_of)[0]
    _edit(folder / first, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"{first}: missing tensor {name}, which {index.name} puts there"):
        Bagel.from_pretrained(folder)
    (folder / first).unlink()
    with pytest.raises(ValueError, match=rf"{first}: no such file"):
        Bagel.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {name: "../../outside.safetensors"}}))
    with pytest.raises(ValueError, match=r"shard '\.\./\.\./outside\.safetensors' must be a file beside"):
        Bagel.from_pretrained(folder)
    for broken in ("{", '{"weight_map": 3}', "[]", '{"weight_map": {"a": 1}}'):
        index.write_text(broken)
        with pytest.raises(ValueError, match=r"index\.json: (not a weight index|shard 1)"):
            Bagel.from_pretrained(folder)


def test_model_safetensors_serves_too(folder: Path) -> None:
    (folder / "ema.safetensors").rename(folder / "model.safetensors")
    Bagel.from_pretrained(folder)


NORM = "language_model.model.norm_moe_gen.weight"
KEY = "language_model.model.layers.1.self_attn.k_proj_moe_gen.bias"  # rows of one of our tensors


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("ema.safetensors", lambda t: t.pop(NORM), rf"ema.safetensors: missing tensor {NORM}"),
        ("ema.safetensors", lambda t: t.pop("language_model.lm_head.weight"), r"missing tensor .*lm_head"),
        ("ema.safetensors", lambda t: t.update(x=torch.zeros(1)), r"ema.safetensors: extra tensor x,"),
        (
            "ema.safetensors",
            lambda t: t.update({NORM: torch.zeros(63)}),
            rf"{NORM} is \[63\], .* \[64\]",
        ),
        ("ema.safetensors", lambda t: t.update({NORM: torch.zeros(64).int()}), rf"{NORM} is I32"),
        ("ema.safetensors", lambda t: t.pop(KEY), rf"ema.safetensors: missing tensor {KEY}"),
        ("ema.safetensors", lambda t: t.update({KEY: torch.zeros(7)}), rf"{KEY} is \[7\], .* \[32\]"),
        ("ema.safetensors", lambda t: t.clear(), r"missing tensor connector.fc1.bias \(and \d+ more\)"),
        (
            "ae.safetensors",
            lambda t: t.pop("encoder.conv_in.bias"),
            r"missing tensor encoder.conv_in.bias",
        ),
        ("ae.safetensors", lambda t: t.update(y=torch.zeros(1)), r"ae.safetensors: extra tensor y,"),
    ],
)
def test_strict(folder: Path, file: str, change: Callable, message: str) -> None:
    _edit(folder / file, change)
    with pytest.raises(ValueError, match=message):
        Bagel.from_pretrained(folder)


@pytest.mark.parametrize("file", ["ema.safetensors", "ae.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "header", "absent"])
def test_unreadable_files_are_named(folder: Path, file: str, damage: str) -> None:
    path = folder / file
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-100])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("version https://git-lfs.github.com/spec/v1\n")
        case "header":
            path.write_bytes(content[:20] + b"\xff" * 40 + content[60:])
        case "absent":
            path.unlink()
    message = "no weights: expected ema" if (damage, file) == ("absent", "ema.safetensors") else file
    with pytest.raises(ValueError, match=message):
        Bagel.from_pretrained(folder)


def test_pickles_are_never_read(folder: Path) -> None:
    (folder / "ema.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"only pickled weights, pytorch_model\.bin.*convert them to ema"):
        Bagel.from_pretrained(folder)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is not a folder: give one .* or 'mini'"):
        Bagel.from_pretrained(tmp_path / "nowhere")


def test_tied_output_layer(small_config: BagelConfig, small_model: Bagel, tmp_path: Path) -> None:
    tokenizer = small_model.tokenizer
    tied = Bagel(replace(small_config, llm=replace(small_config.llm, tie_word_embeddings=True)))
    tied.tokenizer = tokenizer
    hidden_LE = torch.randn(3, 64)
    torch.testing.assert_close(tied.logits(hidden_LE), hidden_LE @ tied.embed_tokens.weight.T)
    tied.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "ema.safetensors")
    assert Bagel.from_pretrained(tmp_path).lm_head is None
    # a config that ties beside a checkpoint that does not: the tensors decide, as in BAGEL's own loader
    small_model.save_pretrained(tmp_path)
    tied.config.save(tmp_path)
    loaded = Bagel.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, small_model.lm_head.weight)
    assert not loaded.config.llm.tie_word_embeddings


def test_tokenizer_of_another_model(folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary |= {f"<extra_{i}>": len(vocabulary) + i for i in range(40)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match=r"the tokenizer has ids up to \d+, the model 288 embeddings"):
        Bagel.from_pretrained(folder)


def test_saving_without_a_tokenizer(small_config: BagelConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set model\.tokenizer = Tokenizer\.load"):
        Bagel(small_config).save_pretrained(tmp_path)


PEAK_SCRIPT = """
import sys, torch
from realign.model.bagel import Bagel

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

dtype = getattr(torch, sys.argv[2])
Bagel.from_pretrained(sys.argv[3], dtype=dtype)  # what a first load brings in stays
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = status("VmRSS")
model = Bagel.from_pretrained(sys.argv[1], dtype=dtype)
print(status("VmHWM") - before, sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_holds_one_copy(small_model: Bagel, checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    """The peak of resident memory while 230 MB of bf16 weights are loaded, as they are and as float32."""
    llm = replace(small_model.config.llm, hidden_size=512, intermediate_size=4096, num_hidden_layers=8)
    with torch.device("meta"):
        large = Bagel(replace(small_model.config, llm=llm)).bfloat16()
    large.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in large.state_dict().values():
            tensor.fill_(0.5)
    large.tokenizer = small_model.tokenizer
    large.save_pretrained(tmp_path)
    command = [sys.executable, "-c", PEAK_SCRIPT, str(tmp_path), dtype, str(checkpoint)]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    peak, weights = map(int, output.stdout.split())
    assert weights > 200e6
    assert peak < 1.1 * weights + 20e6, f"{peak / weights:.2f} times the weights"
