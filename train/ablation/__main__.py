"""Trains, measures and reports Re-Align's ablation on the procedural world; resumable.

    python -m train.ablation --out runs/ablation

Every job is a process of its own with one thread, `--jobs` of them at a time; the base, which all wait for,
has as many processes. Killed, the same command goes on: jobs that are done are left alone, those under way
continue from their checkpoints.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import torch

from train.ablation.jobs import JobRunner
from train.ablation.measure import MeasureOptions
from train.ablation.plan import BASE, Job, Layout, list_jobs
from train.ablation.report import write_report

RECIPES = Path(__file__).parents[1] / "recipes" / "ablation"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    for name in ("seeds", "jobs", "scenes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: must be at least 1")
    layout = Layout(args.out, args.recipes)
    jobs = list_jobs(args.seeds)
    if args.job is not None:
        return run_one(parser, args, layout, jobs)
    failed = run_all(args, layout, jobs)
    if failed is not None:
        print(
            f"{parser.prog}: {failed.name} failed; its output is in {output_of(layout, failed)}",
            file=sys.stderr,
        )
        return 1
    print(write_report(layout, args.seeds))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="train.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder of base.toml and so on")
    parser.add_argument("--seeds", type=int, default=3, help="of every training but the base's (default: 3)")
    parser.add_argument("--scenes", type=int, default=MeasureOptions.num, help="test scenes (default: 1024)")
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="at a time (default: one a core)"
    )
    parser.add_argument("--device", default="auto", help="such as cpu or cuda")
    parser.add_argument(
        "--job", help="one alone, in this process: " + ", ".join(j.name for j in list_jobs(1))
    )
    return parser


def run_one(
    parser: argparse.ArgumentParser, args: argparse.Namespace, layout: Layout, jobs: Sequence[Job]
) -> int:
    """The job that was named."""
    by_name = {job.name: job for job in jobs}
    if args.job not in by_name:
        parser.error(f"--job is {args.job!r}: must be one of {', '.join(by_name)}")
    job = by_name[args.job]
    missing = [need for need in job.needs if not layout.marker(by_name[need]).exists()]
    if missing:
        parser.error(f"--job {args.job} needs {missing[0]}: do that first")
    torch.set_num_threads(1)
    JobRunner(layout, replace(MeasureOptions(), num=args.scenes), args.device).run(job)
    return 0


def run_all(args: argparse.Namespace, layout: Layout, jobs: Sequence[Job]) -> Job | None:
    """Every job that is not done, as soon as what it needs is there. Returns: one that failed, or None."""
    done = {job.name for job in jobs if layout.marker(job).exists()}
    open_jobs = [job for job in jobs if job.name not in done]
    running: dict[Future[int], tuple[Job, float]] = {}
    with ThreadPoolExecutor(args.jobs) as threads:
        while open_jobs or running:
            ready = [job for job in open_jobs if done.issuperset(job.needs)][: args.jobs - len(running)]
            for job in ready:
                open_jobs.remove(job)
                running[threads.submit(start, args, layout, job)] = (job, time.perf_counter())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, began = running.pop(future)
                if future.result() != 0:
                    return job
                done.add(job.name)
                minutes = (time.perf_counter() - began) / 60
                print(f"{job.name}: {minutes:.1f} min ({len(done)} of {len(jobs)} done)", flush=True)
    return None


def start(args: argparse.Namespace, layout: Layout, job: Job) -> int:
    """Runs a job in processes of its own, its output into a file; returns the exit code."""
    command = [sys.executable]
    is_on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    if job.variant == BASE and job.kind == "train" and args.jobs > 1 and is_on_cpu:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.jobs}"]
    command += ["-m", "train.ablation", f"--job={job.name}"]
    for name in ("out", "recipes", "seeds", "scenes", "device"):
        command.append(f"--{name}={getattr(args, name)}")
    output = output_of(layout, job)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode


def output_of(layout: Layout, job: Job) -> Path:
    """What a job printed."""
    return layout.out / "output" / f"{job.name.replace('/', '-')}.txt"


if __name__ == "__main__":
    sys.exit(main())
