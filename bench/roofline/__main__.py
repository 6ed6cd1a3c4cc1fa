"""`python -m bench.roofline`: the least times of the workloads on a chip, from operations and bytes alone.

    python -m bench.roofline --chip h200 h20
    python -m bench.roofline --matrix-tflops 700 --bandwidth-tbs 4.1 --large 768    your own chip and sizes

W1 to W4 are those of `bench.generate`, RGA and CLIP those of `bench.align`, all of BAGEL-7B. What is assumed
stands in `bench/roofline/__init__.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.generate.__main__ import print_table
from bench.generate.models import BAGEL_7B
from bench.generate.report import name_whole_commit
from bench.generate.workloads import BUILDERS, Sizes, build_workloads
from bench.roofline.alignment import SCORED_SIDE, build_iteration, estimate_iteration, estimate_scoring
from bench.roofline.chips import CHIPS, Chip
from bench.roofline.estimate import PHASES, Estimate
from bench.roofline.rows import Line, RooflineRow, write_rows
from bench.tables.format import format_rate

ITERATION, SCORING = "RGA", "CLIP"
WORKLOADS = (*BUILDERS, ITERATION, SCORING)


def estimate(name: str, sizes: Sizes) -> Iterator[Line]:
    """The variants of a workload."""
    if name == ITERATION:
        requests = build_iteration(sizes.small)
        work = estimate_iteration(BAGEL_7B, requests)
        yield Line(name, "LoRA, guided on every step", len(requests), work)
    elif name == SCORING:
        work, count = estimate_scoring(BAGEL_7B)
        yield Line(name, f"ViT-L/14, {SCORED_SIDE}x{SCORED_SIDE}", count, work)
    else:
        for workload in build_workloads(BAGEL_7B, name, sizes=sizes):
            work = Estimate.of(BAGEL_7B, workload.requests)
            yield Line(name, workload.variant, len(workload.requests), work)


def print_chip(chip: Chip, rows: Sequence[RooflineRow]) -> None:
    """A table of one chip's rows, without phases that none has."""
    print(f"{chip.name}: {chip.matrix_tflops:g} TFLOP/s, {chip.bandwidth_tbs:g} TB/s; seconds by phase")
    phases = [name for name in PHASES if any(name in row.phases for row in rows)]
    lines = [
        (
            f"{row.workload} {row.variant}",
            f"{row.pflop:.3g}",
            f"{row.attention:.0%}",
            *(f"{row.phases[name]:.3g}" if name in row.phases else "" for name in phases),
            f"{row.seconds / row.images:.3g}",
            format_rate(row.images_per_s),
            format_rate(row.fp8_images_per_s),
        )
        for row in rows
    ]
    print_table(("", "PFLOP", "attention", *phases, "s/image", "images/s", "fp8"), lines, width=180)


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m bench.roofline`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--chip", nargs="+", choices=CHIPS, default=["h200"], metavar="C", help=" ".join(CHIPS)
    )
    parser.add_argument("--matrix-tflops", type=float, help="what the chip's large bf16 products reach")
    parser.add_argument("--bandwidth-tbs", type=float, help="what its copies reach, in TB/s")
    parser.add_argument("--attention-share", type=float, help="attention's rate over that of the products")
    names = " ".join(WORKLOADS)
    parser.add_argument(
        "--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="W", help=names
    )
    parser.add_argument("--large", type=int, default=1024, help="side of W1's pictures in pixels (1024)")
    parser.add_argument("--small", type=int, default=512, help="side of those of W2 to RGA (512)")
    parser.add_argument("--reference", type=int, default=512, help="side of references (512)")
    parser.add_argument("--out", type=Path, help="a file for the rows, in place of what it holds")
    return parser


def choose_chips(options: argparse.Namespace) -> list[Chip]:
    """The chips, with the rates that were given instead of theirs. Exits with 2 for one that is no rate."""
    given = {name: getattr(options, name) for name in ("matrix_tflops", "bandwidth_tbs", "attention_share")}
    for name, value in given.items():
        if value is not None and not value > 0:
            sys.exit(_refuse(f"--{name.replace('_', '-')} {value:g}: give a number above 0"))
    own = {name: value for name, value in given.items() if value is not None}
    return [replace(CHIPS[name], **own) for name in options.chip]


def _refuse(message: str) -> int:
    print(f"bench.roofline: {message}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    chips = choose_chips(options)
    for name in ("large", "small", "reference"):
        side, stride = getattr(options, name), BAGEL_7B.latent_stride
        if side < stride or side % stride:
            return _refuse(f"--{name} {side}: give a multiple of {stride}")
    sizes = Sizes(options.large, options.small, options.reference)
    lines = [line for name in options.workload for line in estimate(name, sizes)]
    rows = {chip: [RooflineRow.of(line, chip) for line in lines] for chip in chips}
    for chip in chips:
        print_chip(chip, rows[chip])
    if options.out is not None:
        write_rows([row for some in rows.values() for row in some], options.out, name_whole_commit())
        print(f"rows written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
