"""`python -m bench.align`: an iteration of alignment, ours and the reference trainers' way, in one run.

    python -m bench.align                                     mini on a CPU
    python -m bench.align --model bagel-7b --device cuda      BAGEL-7B's size, random weights, LoRA
    python -m bench.align clip --device cuda                  ViT-L/14 scoring alone, random weights

Appends rows, and prints what was to be reached with the measured figure beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.align.measure import measure_alone, measure_scoring, measure_with_baseline
from bench.align.report import Report, describe_row
from bench.align.rows import ITERATION, SCORING
from bench.align.targets import CPU_TARGETS, GPU_TARGETS
from bench.align.workloads import (
    LARGE_CLIP,
    MINI_CLIP,
    PROMPT,
    SCORED,
    VARIANTS,
    Sizes,
    build_large,
    build_mini,
    make_random_clip,
)
from bench.generate.__main__ import find_conditions, print_table
from bench.generate.models import MODELS, load_model
from bench.generate.targets import describe, judge
from bench.rows import RESULTS, append_rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 if a target that was measured is missed."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = build_parser()
    options = parser.parse_args(given)
    needed = {"mini": "cpu", "bagel-7b": "cuda"}[options.model]
    if options.workload == ITERATION and options.device != needed:
        parser.error(f"--device is {options.device}: an iteration of {options.model} is measured on {needed}")
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    conditions = find_conditions(LARGE_CLIP if options.workload == SCORING else options.model, device)
    command, rows = " ".join(["python -m bench.align", *given]), []
    with tempfile.TemporaryDirectory() as folder:
        for report in measure_all(options, Path(folder)):
            new = report.make_rows(conditions, command)
            append_rows(new, options.out)
            print(f"{report.workload} {report.variant}: {report.what}")
            print("\n".join(map(describe_row, new)), flush=True)
            rows += new
    print(f"{len(rows)} rows appended to {options.out}")
    results = judge(GPU_TARGETS if device.type == "cuda" else CPU_TARGETS, rows)
    print_table(("target", "measured", "needed", ""), describe(results))
    return int(any(result.is_met is False for result in results))


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m bench.align`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.align",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workload", nargs="?", choices=(ITERATION, SCORING), default=ITERATION)
    parser.add_argument("--model", choices=MODELS, default="mini")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--variant", choices=VARIANTS, default="unguided", help="of mini's iteration (unguided)"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads on a CPU (2)")
    parser.add_argument("--turns", type=int, default=3, help="times that both take turns (3)")
    parser.add_argument("--prompts", type=int, help="of an iteration, instead of the workload's own")
    parser.add_argument("--group", type=int, help="samples of a prompt, instead of the workload's own")
    out = RESULTS / "align.jsonl"
    parser.add_argument("--out", type=Path, default=out, help=f"where rows are appended ({out.name})")
    return parser


def measure_all(options: argparse.Namespace, folder: Path) -> Iterator[Report]:
    """A report of each workload that is asked for."""
    device, sizes = torch.device(options.device), Sizes(options.prompts, options.group)
    if options.workload == SCORING:
        spec = make_random_clip(LARGE_CLIP, folder)
        yield measure_scoring(spec, device, SCORED[device.type], options.turns)
    elif options.model == "mini":
        recipe = build_mini(options.variant, sizes)
        yield measure_with_baseline(recipe, options.variant, options.turns, MINI_CLIP)
    else:
        prompts = folder / "prompts.txt"
        prompts.write_text(f"{PROMPT}\n")
        recipe = build_large(make_random_clip(LARGE_CLIP, folder), prompts, sizes)
        model = load_model(options.model, device, getattr(torch, recipe.dtype))
        yield measure_alone(recipe, model, "guided on every step", options.turns)


if __name__ == "__main__":
    sys.exit(main())
