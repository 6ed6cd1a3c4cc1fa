"""`realign eval world`, `realign eval clip`: measure a model, or a CLIP."""

from __future__ import annotations

import argparse
import json
from typing import Any

from realign.cli.console import print_error, print_note
from realign.cli.options import CACHING, add_fp8_argument, add_picture_arguments


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `eval`, its benchmarks and their arguments."""
    parser = subparsers.add_parser("eval", help="measure a model on a benchmark")
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    world = benchmarks.add_parser(
        "world",
        help="the procedural world, read by its oracle",
        description="Draw scenes, answer their prompts with and without reasoning, and let the oracle read "
        "the pictures. Prints a table, and as its last line one JSON object.",
    )
    world.add_argument("--model", default="mini", help="a checkpoint folder, or mini (default)")
    world.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="of the scenes (test)"
    )
    world.add_argument("--num", type=int, default=512, metavar="N", help="scenes a task (512)")
    world.add_argument("--seed", type=int, default=0, help="of the scenes and the noise (0)")
    world.add_argument("--steps", type=int, default=25, metavar="N", help="denoising timesteps (25)")
    world.add_argument("--reasoning", default="both", choices=("none", "ic-cot", "both"), help="(both)")
    world.add_argument("--device", default="auto", help="such as cpu or cuda (auto)")
    add_fp8_argument(world)
    add_picture_arguments(world, CACHING)
    _add_clip(benchmarks)


def _add_clip(benchmarks: argparse._SubParsersAction) -> None:
    clip = benchmarks.add_parser(
        "clip",
        help="how well a CLIP tells pictures of the world apart",
        description="How often the true picture of a caption has a higher cosine than one with a single "
        "thing wrong, by what is wrong; rendered, through the autoencoder, and generated. Prints a table, "
        "and as its last line one JSON object.",
    )
    clip.add_argument("--clip", default="mini", help="mini, NAME:TAG, NAME:FILE or a folder (mini)")
    clip.add_argument("--model", default="mini", help="what decodes and generates (mini)")
    clip.add_argument(
        "--split", default="test", choices=("train", "val", "test"), help="of the scenes (test)"
    )
    clip.add_argument("--num", type=int, default=256, metavar="N", help="scenes (256)")
    clip.add_argument("--seed", type=int, default=0, help="of the scenes and the noise (0)")
    clip.add_argument("--steps", type=int, default=13, metavar="N", help="denoising timesteps (13)")
    clip.add_argument(
        "--pictures", default="all", choices=("all", "rendered", "decoded", "generated"), help="(all)"
    )
    clip.add_argument("--device", default="auto", help="such as cpu or cuda (auto)")


def main(args: argparse.Namespace) -> int:
    """Run the benchmark; returns the exit code."""
    run = {"world": run_world, "clip": run_clip}[args.benchmark]
    try:
        check_arguments(args)
        table, result = run(args)
    except ValueError as error:
        print_error(error)
        return 2
    print(table)
    print(json.dumps(result))
    return 0


def run_world(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The table and the result."""
    from realign.api import load  # imported late: help is instant
    from realign.evals.world import WorldOptions, evaluate, format_table
    from realign.runtime.settings import CachingSettings

    caching = CachingSettings(
        args.cache_interval, args.cache_order, args.cache_first, args.reuse_guidance_below
    )
    options = WorldOptions(args.split, args.num, args.seed, args.steps, args.reasoning, caching)
    result = evaluate(load(args.model, device=args.device, fp8=args.fp8), options, report=print_note)
    return format_table(result), result


def run_clip(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The table and the result."""
    from realign.api import load
    from realign.evals.ranking import SORTS, RankingOptions, evaluate, format_table
    from realign.rewards.clip import ClipEncoder

    sorts = SORTS if args.pictures == "all" else (args.pictures,)
    options = RankingOptions(args.split, args.num, args.seed, args.steps, sorts)
    generator = load(args.model, device=args.device)
    result = evaluate(ClipEncoder(args.clip, generator.model.device), generator, options, print_note)
    return format_table(result), result


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for a number that cannot be used."""
    for name, least in (("num", 1), ("seed", 0), ("steps", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: give at least {least}")
