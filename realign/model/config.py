"""What a checkpoint folder says about its model: typed, checked, and written back the same way.

A published BAGEL folder holds `config.json` (which may say nothing but a name), `llm_config.json` (Qwen2's),
`vit_config.json` (SigLIP's, counting one layer more than the model has) and no word about the autoencoder,
which is FLUX's. `BagelConfig.load` reads all of these; absent values are those of BAGEL-7B-MoT and its loader
(ByteDance-Seed/Bagel, `app.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

CONFIG_FILES = ("config.json", "llm_config.json", "vit_config.json", "ae_config.json")
REASONING_MODES = ("none", "think", "ic-cot")
RENORMS = ("global", "channel", "text_channel", "none")  # of guidance, the default first


@dataclass(frozen=True)
class LLMConfig:
    """The Qwen2 decoder; field names and defaults are Qwen2's own (`transformers.Qwen2Config`)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    qk_norm: bool = True

    def __post_init__(self) -> None:
        _check_multiple("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        _check_multiple(
            "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )
        _check_multiple("hidden_size / num_attention_heads", self.head_dim, "the rotary pair", 2)
        _check_multiple("hidden_size", self.hidden_size, "the four parts of a 2-D sin-cos embedding", 4)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ViTConfig:
    """The SigLIP vision tower; `num_hidden_layers` is the count that the model really has."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int
    image_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        _check_multiple("vit hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch."""
        return self.num_channels * self.patch_size**2

    @property
    def num_positions(self) -> int:
        """Rows of the learned position table."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class AutoencoderConfig:
    """The FLUX autoencoder; the defaults are the published one's."""

    resolution: int = 256
    in_channels: int = 3
    downsample: int = 8
    ch: int = 128
    out_ch: int = 3
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        if self.downsample != 2 ** (len(self.ch_mult) - 1):
            raise ValueError(
                f"autoencoder downsample {self.downsample} does not fit ch_mult {list(self.ch_mult)}: "
                f"{len(self.ch_mult)} levels downsample by {2 ** (len(self.ch_mult) - 1)}"
            )
        for channels in {self.ch, *(self.ch * mult for mult in self.ch_mult)}:
            _check_multiple("autoencoder channels", channels, "norm_num_groups", self.norm_num_groups)


@dataclass(frozen=True)
class ResizeRule:
    """How a reference picture is fitted: its largest and smallest side, and their common divisor (pixels)."""

    max_size: int
    min_size: int
    stride: int


@dataclass(frozen=True)
class BagelConfig:
    """A whole model; `load` and `save` speak the published folder layout.

    Beside BAGEL's own values: the two resize rules, the default picture size (height, width), whether a
    prompt with pictures rather takes the size of its last one (as BAGEL does; not for a model of one size),
    the reasoning modes that the weights were trained for, and a name.
    """

    llm: LLMConfig
    vit: ViTConfig
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    latent_patch_size: int = 2
    max_latent_size: int = 64
    vit_max_num_patch_per_side: int = 70
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False
    timestep_shift: float = 1.0
    vae_resize: ResizeRule = ResizeRule(1024, 512, 16)
    vit_resize: ResizeRule = ResizeRule(980, 224, 14)
    default_image_size: tuple[int, int] = (1024, 1024)
    size_follows_picture: bool = True
    reasoning_modes: tuple[str, ...] = ("none", "think")
    name: str = "bagel"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.reasoning_modes) - set(REASONING_MODES))
        if unknown:
            raise ValueError(f"unknown reasoning modes {unknown}: use {list(REASONING_MODES)}")
        if len(self.default_image_size) != 2:
            raise ValueError(f"default_image_size {self.default_image_size} must be [height, width]")

    @property
    def latent_stride(self) -> int:
        """Pixels per latent token, per side."""
        return self.autoencoder.downsample * self.latent_patch_size

    @property
    def latent_dim(self) -> int:
        """Numbers in one latent token."""
        return self.latent_patch_size**2 * self.autoencoder.z_channels

    @classmethod
    def load(cls, folder: str | Path) -> BagelConfig:
        """Read the configs of a checkpoint folder.

        Raises `ValueError` naming the file and the value where something is missing, of the wrong type, or
        asks for what BAGEL's architecture does not have.
        """
        folder = Path(folder)
        main = _read_json(folder / "config.json") or {}
        _check_supported(main, _BAGEL_FIXED, folder / "config.json")
        return cls(
            llm=_load_llm(folder, main),
            vit=_load_vit(folder, main),
            autoencoder=_load_autoencoder(folder, main),
            **_load_extras(main, folder / "config.json"),
        )

    def save(self, folder: str | Path) -> None:
        """Write the four config files of the published layout."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in zip(CONFIG_FILES, self._file_contents(), strict=True):
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")

    def _file_contents(self) -> tuple[dict[str, Any], ...]:
        own = asdict(self)
        llm, vit, autoencoder = own.pop("llm"), own.pop("vit"), own.pop("autoencoder")
        qwen2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", **llm}
        siglip = {"model_type": "siglip_vision_model", **vit}
        main = {
            "model_type": "bagel",
            "architectures": ["Bagel"],
            "visual_gen": True,
            "visual_und": True,
            **own,
            "llm_config": {**qwen2, "layer_module": "Qwen2MoTDecoderLayer"},
            "vit_config": {**siglip, "rope": False},
            "vae_config": {"downsample": autoencoder["downsample"], "z_channels": autoencoder["z_channels"]},
        }
        return main, qwen2, {**siglip, "num_hidden_layers": self.vit.num_hidden_layers + 1}, autoencoder


# What the architecture fixes: a file may repeat these values, and may not contradict them.
_BAGEL_FIXED = {"visual_gen": True, "visual_und": True}
_LLM_FIXED = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "layer_module": "Qwen2MoTDecoderLayer",
    "use_sliding_window": False,
    "rope_scaling": None,
}
_VIT_FIXED = {"model_type": "siglip_vision_model", "rope": False}


def _load_llm(folder: Path, main: Mapping[str, Any]) -> LLMConfig:
    """`llm_config.json` is what BAGEL's loader reads, so it goes before `config.json`'s `llm_config`."""
    path = folder / "llm_config.json"
    data = {**_section(main, "llm_config", folder), **(_read_json(path) or {})}
    if not data:
        raise ValueError(
            f"{folder} has neither llm_config.json nor an llm_config in config.json: not a BAGEL folder"
        )
    rope = data.get("rope_parameters")  # where newer transformers write the two rope values
    if isinstance(rope, Mapping):
        data = {"rope_theta": rope.get("rope_theta", LLMConfig.rope_theta), **data}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"{path}: rope_type {rope['rope_type']!r} is not supported, only 'default'")
    _check_supported(data, _LLM_FIXED, path)
    config = _build(LLMConfig, data, path)
    if data.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"{path}: head_dim {data['head_dim']} must be hidden_size / num_attention_heads")
    return config


def _load_vit(folder: Path, main: Mapping[str, Any]) -> ViTConfig:
    """`vit_config.json` counts one layer too many (BAGEL drops the last); `config.json` counts rightly."""
    path = folder / "vit_config.json"
    data = _section(main, "vit_config", folder)
    own = _read_json(path)
    if own is not None:
        data = {**data, **own}
        if isinstance(own.get("num_hidden_layers"), int):
            data["num_hidden_layers"] = own["num_hidden_layers"] - 1
    if not data:
        raise ValueError(
            f"{folder} has neither vit_config.json nor a vit_config in config.json: not a BAGEL folder"
        )
    _check_supported(data, _VIT_FIXED, path)
    return _build(ViTConfig, data, path)


def _load_autoencoder(folder: Path, main: Mapping[str, Any]) -> AutoencoderConfig:
    """`ae_config.json` tells all, `config.json`'s `vae_config` a little; what neither tells is FLUX's."""
    path = folder / "ae_config.json"
    section, own = _section(main, "vae_config", folder), _read_json(path) or {}
    for key in sorted(section.keys() & own.keys()):
        if section[key] != own[key]:
            raise ValueError(f"{path}: {key} is {own[key]}, but config.json's vae_config says {section[key]}")
    return _build(AutoencoderConfig, {**section, **own}, path if own else folder / "config.json")


def _load_extras(main: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Everything in `config.json` beside the three sub-configs."""
    data = dict(main)
    if isinstance(data.get("name"), list):  # the published file gives a list of one
        data["name"] = " ".join(map(str, data["name"]))
    extras = {}
    for key in ("vae_resize", "vit_resize"):
        if isinstance(data.get(key), Mapping):
            extras[key] = _build(ResizeRule, data.pop(key), path, where=f"{key}.")
    sections = {"llm", "vit", "autoencoder"}
    hints = {
        name: hint
        for name, hint in get_type_hints(BagelConfig).items()
        if name not in sections | extras.keys()
    }
    return {**_take(hints, data, path), **extras}


def _build(cls: type, data: Mapping[str, Any], path: Path, where: str = "") -> Any:
    """A config dataclass from the keys it knows; other keys are other programs' business."""
    values = _take(get_type_hints(cls), data, path, where)
    defaults = {f.name for f in fields(cls) if f.default is not MISSING or f.default_factory is not MISSING}
    missing = [f.name for f in fields(cls) if f.name not in values and f.name not in defaults]
    if missing:
        raise ValueError(f"{path}: missing {where}{missing[0]}")
    return _with_source(cls, values, path)


def _with_source(cls: type, values: Mapping[str, Any], path: Path) -> Any:
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _take(hints: Mapping[str, Any], data: Mapping[str, Any], path: Path, where: str = "") -> dict[str, Any]:
    """Those of `data` that are named in `hints`, each of its type; JSON lists become tuples."""
    values = {}
    for name, hint in hints.items():
        if name not in data or (data[name] is None and hint is not None):
            continue
        value = tuple(data[name]) if isinstance(data[name], list) else data[name]
        if not _is_of_type(value, hint):
            raise ValueError(
                f"{path}: {where}{name} is {data[name]!r}, expected {getattr(hint, '__name__', hint)}"
            )
        values[name] = float(value) if hint is float else value
    return values


def _is_of_type(value: Any, hint: Any) -> bool:
    if hint is bool or hint is str:
        return isinstance(value, hint)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    element = getattr(hint, "__args__", (None,))[0]
    return isinstance(value, tuple) and all(_is_of_type(item, element) for item in value)


def _section(main: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    section = main.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{folder / 'config.json'}: {name} is {section!r}, expected an object")
    return dict(section)


def _check_supported(data: Mapping[str, Any], fixed: Mapping[str, Any], path: Path) -> None:
    for key, value in fixed.items():
        if key in data and data[key] is not None and data[key] != value:
            raise ValueError(f"{path}: {key} {data[key]!r} is not supported: BAGEL has {value!r}")


def _check_multiple(what: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        raise ValueError(f"{what} {value} must be a multiple of {of} {divisor}")


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file is absent. The published `config.json` has a trailing comma."""
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            content = json.loads(re.sub(r",(\s*[}\]])", r"\1", text))
        except json.JSONDecodeError:
            raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
