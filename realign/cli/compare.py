"""`realign compare`: what a faster way to draw costs in quality, on a file of prompts."""

from __future__ import annotations

import argparse
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realign.cli.console import RunError, UsageError, print_error, print_note
from realign.cli.generate import DEFAULT_BATCH_SIZE, check_inputs, load_engine, warn_untrained
from realign.cli.job import build_request, build_tasks, shortage_is_said
from realign.cli.options import PROMPT_FORMATS, RunOptions, add_run_arguments
from realign.data.images import load_picture
from realign.data.readers import PromptError, PromptFile

if TYPE_CHECKING:
    from realign.evals.quality import Score
    from realign.runtime.request import Request


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `compare` and its arguments."""
    parser = subparsers.add_parser(
        "compare",
        help="what a faster way to draw costs in quality",
        description="Draw prompts as asked for, and from the same noise without fp8 or step caching, and "
        "compare pictures and velocities. Exit code 1 where they differ by more than is allowed.",
        allow_abbrev=False,
    )
    parser.add_argument("prompts", metavar="PROMPTS", help="as of realign generate")
    parser.add_argument("--out", required=True, metavar="FILE", help="a JSON file with all that was measured")
    parser.add_argument("--format", default="auto", choices=PROMPT_FORMATS, help="default: by the extension")
    group = parser.add_argument_group("the gate")
    group.add_argument("--min-psnr", type=float, metavar="DB", help="the least mean PSNR over the pictures")
    group.add_argument("--min-worst-psnr", type=float, metavar="DB", help="the least PSNR of any picture")
    group.add_argument(
        "--clip", metavar="MODEL", help="score both with the prompts, by a CLIP as realign score names it"
    )
    add_run_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the comparison; returns the exit code."""
    try:
        result = run(args)
    except (UsageError, PromptError) as error:
        print_error(error)
        return 2
    except (RunError, OSError) as error:
        print_error(error)
        return 1
    print(format_summary(result))
    missed = list_missed(result, args)
    for line in missed:
        print_error(line)
    return 1 if missed else 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check, draw, compare, write the file. Raises UsageError or PromptError for what cannot be done."""
    options = RunOptions.from_args(args)
    check_arguments(args, options)
    prompts, _, model, device, dtype = check_inputs(options)
    warn_untrained(options.picture.reasoning, model)
    requests = build_requests(prompts, options)
    plain = fast = load_engine(options, model, device, dtype)
    if options.fp8 is not None:
        fast = load_engine(options, model, device, dtype, options.fp8)
    scorer = load_scorer(args.clip, device)
    from realign.evals.quality import compare  # imported late: it brings torch

    print_note(f"{len(requests)} pictures, each drawn three times; {device}, {dtype}")
    size = options.batch_size or DEFAULT_BATCH_SIZE
    with shortage_is_said():
        result = compare(plain, fast, requests, size, scorer, print_note)
    about = {
        "model": {"name": model.name, "fingerprint": model.fingerprint()},
        "prompts": {"file": str(options.prompts), "sha256": prompts.sha256},
        "device": device,
        "dtype": dtype,
        "fp8": None if options.fp8 is None else str(options.fp8),
        "settings": options.picture.as_json(),
    }
    options.out.write_text(json.dumps(about | result, indent=1) + "\n", encoding="utf-8")
    return result


def check_arguments(args: argparse.Namespace, options: RunOptions) -> None:
    """Raises UsageError where there is nothing to compare, or nowhere to write it, or no such threshold."""
    options.check()
    if not options.picture.settings().caching.is_on and options.fp8 is None:
        raise UsageError("nothing is drawn faster: give --fp8, --cache-interval or --reuse-guidance-below")
    for name in ("min_psnr", "min_worst_psnr"):
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a number of decibels, such as 30")
    check_out(options.out)


def check_out(path: Path) -> None:
    """Raises UsageError where no file can be written."""
    if not path.resolve().parent.is_dir() or path.is_dir():
        raise UsageError(f"--out {path}: give the name of a file in a folder that is there")


def build_requests(prompts: PromptFile, options: RunOptions) -> list[Request]:
    """The requests that `realign generate` would make of the prompts."""
    settings, load = options.picture.settings(), lru_cache(maxsize=16)(load_picture)
    tasks = build_tasks(prompts, options.picture.num_images)
    seeds = [options.picture.seed if task.entry.seed is None else task.entry.seed for task in tasks]
    return [build_request(task, seed, settings, load) for task, seed in zip(tasks, seeds, strict=True)]


def load_scorer(spec: str | None, device: str) -> Score | None:
    """The cosine of a picture with its prompt's texts, by the CLIP that `spec` names."""
    if spec is None:
        return None
    from realign.rewards.clip import ClipEncoder
    from realign_kernels import clip_score

    try:
        encoder = ClipEncoder(spec, device)
    except ValueError as error:
        raise UsageError(f"--clip {spec}: {error}") from error
    return lambda images, texts: clip_score(
        encoder.encode_pictures(images), encoder.encode_texts(texts)
    ).tolist()


def list_missed(result: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """What the gate does not let through, a line each."""
    found = {"min_psnr": result["psnr"]["mean"], "min_worst_psnr": result["psnr"]["worst"]}
    asked = {name: getattr(args, name) for name in found if getattr(args, name) is not None}
    return [
        f"PSNR is {found[name]:.2f} dB: --{name.replace('_', '-')} asks for {least:g}"
        for name, least in asked.items()
        if found[name] < least
    ]


def format_summary(result: dict[str, Any]) -> str:
    """The result for people."""
    psnr, velocity, latent, seconds = (
        result[name] for name in ("psnr", "velocity_error", "latent_error", "seconds")
    )
    lines = [
        f"PSNR             mean {psnr['mean']:.2f} dB, worst {psnr['worst']:.2f} dB ({psnr['worst_id']})",
        f"velocity error   mean {velocity['mean']:.2e} of its norm, worst {velocity['worst']:.2e}, by step",
        f"latent error     mean {latent['mean']:.2e}, worst {latent['worst']:.2e}, at the end",
        f"seconds          {seconds['plain']:.1f} plain, {seconds['fast']:.1f} fast",
    ]
    if "score" in result:
        lines.append(
            f"CLIP cosine      {result['score']['plain']:.4f} plain, {result['score']['fast']:.4f} fast"
        )
    if result["other_texts"]:
        lines.append(f"other reasoning  in {result['other_texts']} of {result['pictures']}")
    return "\n".join(lines)
