"""Checkpoint files: the one place that knows their tensor names.

A folder holds the model in `ema.safetensors` (or `model.safetensors`, or shards with an index) and the
autoencoder in `ae.safetensors`. Loading is strict, never unpickles, and holds one copy of the weights; saving
replaces whole files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from realign.model.config import BagelConfig
from realign.model.linear import FusedLinear

MODEL_FILE = "ema.safetensors"
AUTOENCODER_FILE = "ae.safetensors"
MODEL_FILES = (MODEL_FILE, f"{MODEL_FILE}.index.json", "model.safetensors", "model.safetensors.index.json")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors names them
AUTOENCODER_PREFIX = "autoencoder."
LM_HEAD = "lm_head.weight"

# Our names and the published ones; `{}` is where the generation expert is marked.
_EXPERT_SUFFIX = {"und": "", "gen": "_moe_gen"}
_EXPERT_MODULES = {
    "input_norm": "input_layernorm{}",
    **{
        name: f"self_attn.{name}{{}}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    },
    "post_attention_norm": "post_attention_layernorm{}",
    **{name: f"mlp{{}}.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}
_VIT_MODULES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    **{name: f"mlp.{name}" for name in ("fc1", "fc2")},
}
_MODULES = {
    "embed_tokens": "language_model.model.embed_tokens",
    "lm_head": "language_model.lm_head",
    "decoder.norm.und": "language_model.model.norm",
    "decoder.norm.gen": "language_model.model.norm_moe_gen",
    "vit.patch_embedding": "vit_model.vision_model.embeddings.patch_embedding",
    "vit.position_embedding": "vit_model.vision_model.embeddings.position_embedding",
    "vit.post_norm": "vit_model.vision_model.post_layernorm",
    "vit_position": "vit_pos_embed",
    "latent_position": "latent_pos_embed",
}


def published_name(name: str) -> str:
    """The published name of a parameter of `Bagel`, or of one projection of a fused one.

    `decoder.layers.0.gen.q_proj.weight` is `language_model.model.layers.0.self_attn.q_proj_moe_gen.weight`.
    """
    if name.startswith(AUTOENCODER_PREFIX):
        return name.removeprefix(AUTOENCODER_PREFIX)
    if name.startswith("decoder.layers."):
        layer, expert, module, leaf = name.removeprefix("decoder.layers.").split(".")
        module = _EXPERT_MODULES[module].format(_EXPERT_SUFFIX[expert])
        return f"language_model.model.layers.{layer}.{module}.{leaf}"
    if name.startswith("vit.layers."):
        layer, module, leaf = name.removeprefix("vit.layers.").split(".")
        return f"vit_model.vision_model.encoder.layers.{layer}.{_VIT_MODULES[module]}.{leaf}"
    module, _, leaf = name.rpartition(".")
    return f"{_MODULES.get(module, module)}.{leaf}"


@dataclass(frozen=True, eq=False)
class Part:
    """What a published tensor is of our parameters: some rows of one.

    Attributes:
        parameter: the name of ours.
        name: the name that these rows would have as a parameter of their own.
        rows: None is all.
    """

    parameter: str
    name: str
    rows: slice | None = None

    def of(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The rows: a view."""
        tensor = tensors[self.parameter]
        return tensor if self.rows is None else tensor[self.rows]


def list_parts(model: nn.Module) -> dict[str, Part]:
    """The part of every published tensor of a `Bagel`, by published name."""
    parts = []
    for parameter in model.state_dict():
        path, _, leaf = parameter.rpartition(".")
        module, prefix = model.get_submodule(path), path.rpartition(".")[0]
        if isinstance(module, FusedLinear):
            rows = module.rows().items()
            parts += [Part(parameter, f"{prefix}.{name}.{leaf}", own) for name, own in rows]
        else:
            parts.append(Part(parameter, parameter))
    return {published_name(part.name): part for part in parts}


def find_folder(path: str | Path) -> Path:
    """The checkpoint folder that a user means: "mini" is the one inside the package."""
    folder = Path(str(files("realign") / "assets" / "mini")) if str(path) == "mini" else Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one that holds a BAGEL checkpoint, or 'mini'")
    return folder


def settle_tying(config: BagelConfig, folder: Path) -> BagelConfig:
    """The config, untied where the checkpoint has an output layer of its own.

    Some Qwen2 configs say `tie_word_embeddings`, and BAGEL's loader overrules them: the tensors decide.
    """
    if config.llm.tie_word_embeddings and published_name(LM_HEAD) in _read_model_headers(folder):
        return replace(config, llm=replace(config.llm, tie_word_embeddings=False))
    return config


def load_weights(model: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a model that was built on the meta device.

    Raises `ValueError` naming tensor and file where one is missing, extra, misshapen or not of a float type,
    and naming the file where one cannot be read.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    found = ((_read_headers(folder / AUTOENCODER_FILE), True), (_read_model_headers(folder), False))
    checked = [(headers, _checked(headers, model, is_autoencoder)) for headers, is_autoencoder in found]
    for headers, parts in checked:
        for name, part in parts.items():
            if part.parameter not in tensors:
                tensors[part.parameter] = torch.empty(shapes[part.parameter], dtype=dtype, device=device)
            part.of(tensors).copy_(_read_tensor(headers[name]))
    model.load_state_dict(tensors, strict=True, assign=True)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write `ema.safetensors` and `ae.safetensors`, each under another name first and then put in place."""
    state = model.state_dict()
    for file_name, is_autoencoder in ((MODEL_FILE, False), (AUTOENCODER_FILE, True)):
        tensors = {
            name: part.of(state).detach().contiguous()
            for name, part in _parts_of(model, is_autoencoder).items()
        }
        partial = folder / f".{file_name}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, folder / file_name)


@dataclass(frozen=True)
class _Header:
    """Where a tensor is, and what it is, before it is read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def _parts_of(model: nn.Module, is_autoencoder: bool) -> dict[str, Part]:
    """What one of the two files holds."""
    return {
        name: part
        for name, part in list_parts(model).items()
        if part.parameter.startswith(AUTOENCODER_PREFIX) == is_autoencoder
    }


def _checked(found: dict[str, _Header], model: nn.Module, is_autoencoder: bool) -> dict[str, Part]:
    """The parts of a file, once each is there as the config asks."""
    expected, state = _parts_of(model, is_autoencoder), model.state_dict()
    files_read = ", ".join(sorted({str(header.path) for header in found.values()})) or "the checkpoint"
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise ValueError(f"{files_read}: missing tensor {_some(missing)}, which the config asks for")
    if extra:
        raise ValueError(
            f"{found[extra[0]].path}: extra tensor {_some(extra)}, for which the config has no place"
        )
    for name, part in expected.items():
        header, shape = found[name], part.of(state).shape
        if header.shape != shape:
            raise ValueError(
                f"{header.path}: tensor {name} is {list(header.shape)}, the config asks for {list(shape)}"
            )
        if header.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{header.path}: tensor {name} is {header.dtype}: only {', '.join(FLOAT_DTYPES)} are read"
            )
    return expected


def _some(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _read_model_headers(folder: Path) -> dict[str, _Header]:
    """Headers of the model's tensors, from one file or from shards."""
    path = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    if path is None:
        path = _find_other_index(folder)
    if path.name.endswith(".index.json"):
        return _read_sharded_headers(path)
    return _read_headers(path)


def _find_other_index(folder: Path) -> Path:
    """The only `*.safetensors.index.json`, whatever its name; otherwise say what is there instead."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return indexes[0]
    if indexes:
        raise ValueError(f"{folder}: several weight indexes, {_some([p.name for p in indexes])}: keep one")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{folder}: only pickled weights, {_some(pickles)}: they can run code when read and are never "
            f"loaded; convert them to {MODEL_FILE}"
        )
    raise ValueError(
        f"{folder}: no weights: expected {MODEL_FILE}, model.safetensors, or shards with an index"
    )


def _read_sharded_headers(index_path: Path) -> dict[str, _Header]:
    """Headers of all shards of an index, each tensor in the shard that the index names."""
    try:
        shard_of = json.loads(index_path.read_text())["weight_map"]
        names = sorted(set(shard_of.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_path}: not a weight index: {error!r}") from None
    found: dict[str, _Header] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index_path}: shard {name!r} must be a file beside the index")
        found.update(_read_headers(index_path.parent / name))
    for tensor, name in shard_of.items():
        if tensor not in found or found[tensor].path.name != name:
            raise ValueError(
                f"{index_path.parent / name}: missing tensor {tensor}, which {index_path.name} puts there"
            )
    return found


def _read_headers(path: Path) -> dict[str, _Header]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
        return {
            name: _Header(path, name, tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        }


def _read_tensor(header: _Header) -> torch.Tensor:
    """One tensor, which hangs on the file until it is copied.

    The file is opened anew for each: an open file is mapped into memory, and what has been read of it stays
    counted against the process until it is closed; held open, that is a second copy of the weights.
    """
    with _open(header.path) as file:
        return file.get_tensor(header.name)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a readable safetensors file (cut short, or not downloaded?): {error}"
        ) from None
