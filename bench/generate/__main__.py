"""`python -m bench.generate`: whole pictures with our engine and with the reference's algorithm, in one run.

Appends rows, and prints what was to be reached with the measured figure beside it. The `geneval` workload is
`realign generate` of the file given by --prompts, GenEval's `evaluation_metadata.jsonl`; without one, of as
many prompts of mini's own world.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.generate.clock import NoClock
from bench.generate.command import NUM_PROMPTS, PromptSet, measure_command, write_world_prompts
from bench.generate.flops import count_requests
from bench.generate.measure import make_with_baseline, make_with_engine, measure_workload
from bench.generate.models import MODELS, load_model
from bench.generate.report import Conditions, Report, name_machine
from bench.generate.rows import BASELINE, ENGINE, GenerateRow
from bench.generate.targets import CPU_TARGETS, GPU_TARGETS, describe, judge
from bench.generate.trace import Counts, count_per_step
from bench.generate.workloads import BUILDERS, Workload, build_workloads
from bench.rows import RESULTS, append_rows
from realign.model.bagel import Bagel

COMMAND = "geneval"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 if a target that was measured is missed."""
    options = build_parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    conditions = find_conditions(options.model, device)
    model = load_model(options.model, device, getattr(torch, conditions.dtype))
    rows = []
    for report in measure_all(model, options):
        new = report.make_rows(conditions)
        append_rows(new, options.out)
        for row in new:
            print(describe_row(row), flush=True)
        rows += new
    print(f"{len(rows)} rows appended to {options.out}")
    results = judge(CPU_TARGETS if options.model == "mini" else GPU_TARGETS, rows)
    print_table(("target", "measured", "needed", ""), describe(results))
    return int(any(result.is_met is False for result in results))


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m bench.generate`."""
    parser = argparse.ArgumentParser(prog="python -m bench.generate", description=__doc__)
    names = [*BUILDERS, COMMAND]
    shown = " ".join(names)
    parser.add_argument("--workload", nargs="+", choices=names, default=names, metavar="W", help=shown)
    parser.add_argument("--variant", help="of the workloads only the one called so, such as 'batch 8'")
    parser.add_argument("--model", choices=MODELS, default="mini")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="torch threads on a CPU (2)")
    parser.add_argument("--turns", type=int, default=3, help="times that engine and baseline take turns (3)")
    parser.add_argument(
        "--baseline-samples", type=int, default=3, help="pictures of the baseline in a turn (3); scaled up"
    )
    parser.add_argument("--max-samples", type=int, help="pictures of a workload at most, for a quick look")
    parser.add_argument("--prompts", type=Path, help=f"a prompt file for {COMMAND}")
    out = RESULTS / "generate.jsonl"
    parser.add_argument("--out", type=Path, default=out, help=f"where rows are appended ({out.name})")
    return parser


def find_conditions(model: str, device: torch.device) -> Conditions:
    """What all rows say; on CUDA the rate of matrix products is measured here."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    rate = 0.0
    if device.type == "cuda":
        from bench.device import CudaTimer

        timer = CudaTimer()
        with timer.scope():
            rate = timer.machine.matmul_tflop_per_s
    return Conditions(model, dtype, name_machine(device), torch.get_num_threads(), rate)


def measure_all(model: Bagel, options: argparse.Namespace) -> Iterator[Report]:
    """A report for each workload and variant, as it is done."""
    for name in options.workload:
        if name == COMMAND:
            yield from measure_prompts(model, options)
            continue
        workloads = build_workloads(model.config, name, options.max_samples)
        for workload in [one for one in workloads if options.variant in (None, one.variant)]:
            print(f"{workload.name} {workload.variant}: {len(workload.requests)} images", flush=True)
            measured = measure_workload(model, workload, options.turns, options.baseline_samples)
            flops = count_requests(model, workload.requests, measured.engine.made)
            counts = count_steps(model, workload) if model.device.type == "cuda" else {}
            yield Report(workload.name, workload.variant, len(workload.requests), measured, flops, counts)


def measure_prompts(model: Bagel, options: argparse.Namespace) -> Iterator[Report]:
    """The command on a file of prompts: mini's, on a CPU."""
    if options.model != "mini" or options.device != "cpu":
        print(f"{COMMAND}: left out, it is the whole command with mini on a CPU")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.prompts
        if path is None:
            path = write_world_prompts(Path(folder) / "world.txt", options.max_samples or NUM_PROMPTS)
        prompts = PromptSet.read(path)
        requests, variant = prompts.build_requests(), prompts.describe()
        print(f"{COMMAND}: {variant}", flush=True)
        measured = measure_command(model, prompts, options.turns, options.baseline_samples)
        flops = count_requests(model, requests, [None] * len(requests))
        yield Report(COMMAND, variant, len(requests), measured, flops)


def count_steps(model: Bagel, workload: Workload) -> dict[str, Counts]:
    """Launches and waits in a step; of the baseline's for one picture."""
    requests = list(workload.requests)
    return {
        ENGINE: count_per_step(lambda some: make_with_engine(model, some, NoClock()), requests),
        BASELINE: count_per_step(lambda some: make_with_baseline(model, some, NoClock()), requests[:1]),
    }


def describe_row(row: GenerateRow) -> str:
    """A row for people."""
    words = [f"  {row.impl:8}  {row.seconds:.4g} s ({row.images_per_s:.3g} images/s)"]
    if row.measured_images < row.images:
        words.append(f"scaled from {row.measured_images} of {row.images} images")
    if row.tokens:
        words.append(f"{row.tokens_per_s:.4g} tokens/s")
    words.append("  ".join(f"{phase} {seconds:.3g} s" for phase, seconds in row.phases.items() if seconds))
    words.append(f"{row.peak_memory_mb:.0f} MB")
    if row.matmul_tflop_per_s:
        words.append(
            f"{row.matrix_share:.0%} of the matrix rate ({row.denoising_matrix_share:.0%} denoising)"
        )
        words.append(f"a step: {row.launches_per_step:.0f} launches, {row.syncs_per_step:.0f} syncs")
    if row.impl == ENGINE and row.times_faster:
        words.append(f"{row.times_faster:.3g} times faster")
    return "; ".join(words)


def print_table(columns: Sequence[str], lines: Sequence[Sequence[str]], width: int = 120) -> None:
    """A table on standard output, so wide where that is no terminal."""
    table = Table(*columns)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else width).print(table)


if __name__ == "__main__":
    sys.exit(main())
