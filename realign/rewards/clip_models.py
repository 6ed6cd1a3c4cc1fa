"""CLIP models, found by name or in files: open_clip's own, and transformers' folders. N rows, L tokens."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from realign.libraries import import_open_clip, mend_torchvision

OPEN_CLIP_CONFIG = "open_clip_config.json"
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, as transformers' files have it


class ClipModel(ABC):
    """A CLIP, in eval mode, on a device.

    Attributes:
        name: for messages.
        dtype: of its weights: bfloat16 on a GPU, float32 on a CPU.
        context_length: tokens of a text that it reads, both ends included.
        preprocess: size, resize_mode, mean, std and fill, as `clip_preprocess` takes them.
    """

    name: str
    dtype: torch.dtype
    context_length: int
    preprocess: Mapping[str, Any]

    @abstractmethod
    def encode_pictures(self, pixels_NCHW: Tensor) -> Tensor:
        """[N, D], not normalised."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """int64 [N, L], and bool [N]: whether the text had to be cut to `context_length` tokens."""

    @abstractmethod
    def encode_texts(self, ids_NL: Tensor) -> Tensor:
        """[N, D], not normalised."""


def load_clip(spec: str, device: torch.device) -> ClipModel:
    """A CLIP that a spec names.

    Args:
        spec: "mini" (the one inside the package); "NAME:TAG", open_clip's, such as "ViT-L-14:openai";
            "NAME:FILE", such as "ViT-L-14:/data/clip.safetensors"; a folder with `open_clip_config.json`; or
            one as transformers saves a CLIPModel.
        device: where it is loaded.

    Raises: ValueError for what is not there or cannot be read.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = find_mini() if spec == "mini" else Path(spec).expanduser()
    if path.is_dir():
        if (path / OPEN_CLIP_CONFIG).is_file():
            return OpenClip(spec, f"local-dir:{path}", None, device, dtype)
        if (path / "config.json").is_file():
            return TransformersClip(spec, path, device, dtype)
        raise ValueError(f"clip {spec!r}: the folder has neither {OPEN_CLIP_CONFIG} nor config.json")
    name, separator, weights = spec.partition(":")
    if not separator or not name or not weights:
        raise ValueError(
            f"clip {spec!r}: must be 'mini', a folder, NAME:TAG such as ViT-L-14:openai, or NAME:FILE"
        )
    return OpenClip(spec, name, weights, device, dtype)


def find_mini() -> Path:
    """The mini CLIP, trained on the procedural world."""
    return Path(str(files("realign") / "assets" / "clip-mini"))


class OpenClip(ClipModel):
    """A model of open_clip's."""

    def __init__(
        self, spec: str, model: str, weights: str | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        open_clip = import_open_clip()
        self.name, self.dtype = spec, dtype
        check_open_clip(open_clip, spec, model, weights)
        try:
            self._model = open_clip.create_model(
                model, pretrained=weights, device="cpu", load_weights=True, weights_only=True
            )
            self._tokenizer = open_clip.get_tokenizer(model)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"clip {spec!r}: cannot be loaded ({_one_line(error)})") from error
        self.preprocess = read_open_clip(spec, self._model.visual.preprocess_cfg)
        self._model = freeze(self._model, device, dtype)
        self.context_length = self._tokenizer.context_length

    def encode_pictures(self, pixels_NCHW: Tensor) -> Tensor:
        return self._model.encode_image(pixels_NCHW)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids_NL = self._tokenizer(list(texts))
        longer_NL = self._tokenizer(list(texts), context_length=self.context_length + 1)
        pad = getattr(getattr(self._tokenizer, "tokenizer", None), "pad_token_id", 0)
        return ids_NL, longer_NL[:, -1] != pad

    def encode_texts(self, ids_NL: Tensor) -> Tensor:
        return self._model.encode_text(ids_NL)


class TransformersClip(ClipModel):
    """A folder as transformers saves a CLIPModel with its processor."""

    def __init__(self, spec: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        mend_torchvision()
        from transformers import CLIPModel, CLIPTokenizer

        self.name, self.dtype = spec, dtype
        self.preprocess = read_transformers(spec, folder)
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"clip {spec!r}: cannot be loaded ({_one_line(error)})") from error
        self._model = freeze(model, device, dtype)
        self.context_length = model.config.text_config.max_position_embeddings

    def encode_pictures(self, pixels_NCHW: Tensor) -> Tensor:
        return self._model.visual_projection(self._model.vision_model(pixels_NCHW).pooler_output)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.context_length
        )
        lengths = [len(ids) for ids in self._tokenizer(list(texts), truncation=False)["input_ids"]]
        return torch.tensor(found["input_ids"]), torch.tensor(lengths) > self.context_length

    def encode_texts(self, ids_NL: Tensor) -> Tensor:
        return self._model.text_projection(self._model.text_model(ids_NL).pooler_output)


def check_open_clip(open_clip: Any, spec: str, model: str, weights: str | None) -> None:
    """Raises ValueError for a name or tag that open_clip does not have, before it downloads anything."""
    if weights is None:
        return
    if model not in open_clip.list_models():
        raise ValueError(f"clip {spec!r}: open_clip has no model {model!r}; open_clip.list_models() has them")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights not in tags and not Path(weights).is_file():
        shown = ", ".join(tags[:6]) or "none"
        raise ValueError(f"clip {spec!r}: {weights!r} is neither a file nor a tag of {model} ({shown}, ...)")


def read_open_clip(spec: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's `preprocess_cfg` as options of `clip_preprocess`."""
    if config.get("interpolation", "bicubic") != "bicubic":
        raise ValueError(f"clip {spec!r}: resizes {config['interpolation']}; only bicubic is supported")
    size = config["size"]
    return {
        "size": size if isinstance(size, int) else tuple(size),
        "resize_mode": config.get("resize_mode", "shortest"),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "fill": int(config.get("fill_color", 0)),
    }


def read_transformers(spec: str, folder: Path) -> dict[str, Any]:
    """`preprocessor_config.json` as options of `clip_preprocess`."""
    try:
        config = json.loads((folder / "preprocessor_config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"clip {spec!r}: no preprocessor_config.json that can be read") from error
    side = config.get("size", 224)
    side = side.get("shortest_edge") if isinstance(side, Mapping) else side
    crop = config.get("crop_size", side)
    crop = (crop["height"], crop["width"]) if isinstance(crop, Mapping) else (crop, crop)
    if config.get("resample", BICUBIC) != BICUBIC or crop != (side, side):
        raise ValueError(
            f"clip {spec!r}: preprocessor_config.json must resize the short side bicubically and crop as much"
        )
    return {
        "size": side,
        "resize_mode": "shortest",
        "mean": tuple(config["image_mean"]),
        "std": tuple(config["image_std"]),
        "fill": 0,
    }


def freeze(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """For inference alone."""
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
