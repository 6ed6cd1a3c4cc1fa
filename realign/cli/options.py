"""The settings of a generate run, as the command line gives them and its folder keeps them."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from realign.cli.console import UsageError
from realign.data.readers import MAX_SEED
from realign.model.config import REASONING_MODES, RENORMS
from realign.runtime.options import GenerateOptions
from realign.runtime.settings import ATTENTION_BACKENDS, MAX_ORDER

DTYPES = ("float32", "bfloat16")
PROMPT_FORMATS = ("auto", "txt", "jsonl", "geneval")


@dataclass(frozen=True)
class PictureOptions(GenerateOptions):
    """What decides the pictures, beside model, prompts and device; named as on the command line."""

    num_images: int = 1
    seed: int = 0

    def check(self) -> None:
        """Raises UsageError for a value that no model could take."""
        _check_range("--num-images", self.num_images, 1)
        _check_range("--steps", self.steps, 2)
        _check_range("--text-guidance-scale", self.text_guidance_scale, 0.0)
        _check_range("--image-guidance-scale", self.image_guidance_scale, 0.0)
        _check_range("--guidance-renorm-min", self.guidance_renorm_min, 0.0, 1.0)
        _check_range("--temperature", self.temperature, 0.0)
        _check_range("--max-reasoning-tokens", self.max_reasoning_tokens, 1)
        _check_range("--seed", self.seed, 0, MAX_SEED)
        _check_range("--cache-interval", self.cache_interval, 1)
        _check_range("--cache-order", self.cache_order, 0, MAX_ORDER)
        _check_range("--cache-first", self.cache_first, 1)
        _check_range("--reuse-guidance-below", self.reuse_guidance_below, 0.0, 1.0)
        _check_positive("--timestep-shift", self.timestep_shift)
        _check_positive("--top-p", self.top_p, 1.0)
        low, high = self.guidance_interval
        if not 0.0 <= low < high <= 1.0:
            raise UsageError(
                f"--guidance-interval {low:g} {high:g}: give two times LOW HIGH with 0 <= LOW < HIGH <= 1"
            )

    def of_request(self) -> dict[str, object]:
        """Those of a single request, as `realign.api.build_settings` takes them."""
        return {name: value for name, value in vars(self).items() if name not in ("num_images", "seed")}

    def as_json(self) -> dict[str, object]:
        values = asdict(self)
        values["guidance_interval"] = list(self.guidance_interval)
        return values


@dataclass(frozen=True)
class RunOptions:
    """A whole generate command."""

    prompts: Path
    out: Path
    format: str = "auto"
    model: str = "mini"
    batch_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    memory_gb: float | None = None
    fp8: Path | None = None
    picture: PictureOptions = PictureOptions()

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> RunOptions:
        values = vars(args)
        picture = {name: values[name] for name in PictureOptions.__dataclass_fields__}
        picture["guidance_interval"] = tuple(picture["guidance_interval"])
        names = ("format", "model", "batch_size", "device", "dtype", "attention", "fp8", "memory_gb")
        own = {name: values[name] for name in names}
        return cls(Path(args.prompts), Path(args.out), picture=PictureOptions(**picture), **own)

    def check(self) -> None:
        self.picture.check()
        if self.batch_size is not None:
            _check_range("--batch-size", self.batch_size, 1)
        if self.memory_gb is not None:
            _check_positive("--memory-gb", self.memory_gb)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of a run but its prompts and folder."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="mini", help="mini, or a folder with a BAGEL checkpoint (mini)")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (cuda where there is one)")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", *DTYPES), help="(bfloat16 on cuda, else float32)"
    )
    group.add_argument(
        "--attention",
        default="auto",
        choices=("auto", *ATTENTION_BACKENDS),
        help="the library of attention (varlen on cuda, sdpa on a CPU)",
    )
    add_fp8_argument(group)
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="pictures at a time at most (as many as fit)"
    )
    group.add_argument(
        "--memory-gb",
        type=float,
        metavar="GB",
        help="for work in progress, beside the weights (what is free on cuda, 2 on a CPU)",
    )
    for title in PICTURE_ARGUMENTS:
        add_picture_arguments(parser, title)


def add_fp8_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--fp8",
        type=Path,
        metavar="FILE",
        help="float8 products in the generation expert, by scales that `realign calibrate` made (off)",
    )


def add_picture_arguments(parser: argparse.ArgumentParser, title: str) -> None:
    """One group of `PICTURE_ARGUMENTS`."""
    group = parser.add_argument_group(title)
    for name, (metavar, meaning) in PICTURE_ARGUMENTS[title].items():
        _add_field(group, name, metavar, meaning)


CACHING = "step caching (off by default; `realign compare` measures what it costs)"
# By group of the help: the fields of PictureOptions, each with its metavar (or choices) and its meaning.
PICTURE_ARGUMENTS = {
    "pictures": {
        "num_images": ("N", "pictures for each prompt"),
        "height": ("PIXELS", "with --width; else the model's rule"),
        "width": ("PIXELS", "with --height"),
        "steps": ("N", "timesteps, so N - 1 denoising steps"),
        "timestep_shift": ("S", "above 1: more of the steps at high noise"),
        "seed": ("N", "of prompts without their own"),
    },
    "guidance": {
        "text_guidance_scale": ("S", "1 is off"),
        "image_guidance_scale": ("S", "1 is off"),
        "guidance_interval": (("LOW", "HIGH"), "guide while LOW < t <= HIGH; t = 1 is noise"),
        "guidance_renorm": (RENORMS, "what the guided velocity's norm is held to"),
        "guidance_renorm_min": ("S", "the least factor of renorm"),
    },
    CACHING: {
        "cache_interval": ("N", "compute every Nth step and the last, forecast the others; 1 is off"),
        "cache_order": ("N", "of the forecast: 0 repeats, 1 goes straight on"),
        "cache_first": ("N", "so many first steps are computed"),
        "reuse_guidance_below": ("T", "where t <= T, guidance adds what it last added; 0 is off"),
    },
    "reasoning": {
        "reasoning": (REASONING_MODES, "what is written before the picture"),
        "temperature": ("T", "0 is greedy"),
        "top_p": ("P", "keep the likeliest tokens of this total probability"),
        "max_reasoning_tokens": ("N", "where a text is cut off"),
    },
}


def _add_field(
    group: argparse._ArgumentGroup, name: str, metavar: str | tuple[str, ...], meaning: str
) -> None:
    default = getattr(PictureOptions, name)
    flag = f"--{name.replace('_', '-')}"
    if default is None:
        group.add_argument(flag, type=int, metavar=metavar, help=meaning)
    elif isinstance(default, str):
        group.add_argument(flag, choices=metavar, default=default, help=f"{meaning} ({default})")
    elif isinstance(default, tuple):
        shown = " ".join(f"{value:g}" for value in default)
        group.add_argument(
            flag, type=float, nargs=2, metavar=metavar, default=default, help=f"{meaning} ({shown})"
        )
    else:
        kind = type(default)
        group.add_argument(flag, type=kind, metavar=metavar, default=default, help=f"{meaning} ({default})")


def _check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        upper = "" if math.isinf(high) else f" and at most {high:g}"
        raise UsageError(f"{name} {value}: give a number that is at least {low:g}{upper}")


def _check_positive(name: str, value: float, high: float = math.inf) -> None:
    if not (math.isfinite(value) and 0.0 < value <= high):
        upper = "" if math.isinf(high) else f" and at most {high:g}"
        raise UsageError(f"{name} {value}: give a number above 0{upper}")
