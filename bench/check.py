"""`python -m bench.check`: whether what is promised holds on a device, and by how much.

    python -m bench.check --device cuda                      mini, float32 and bfloat16
    python -m bench.check --device cuda --check graphs independence --model bagel-7b --dtype bfloat16

The tests say it of a CPU; this says it of a GPU, in minutes. Appends a row for each figure; exit code 1 if
one is above its bound, 2 if there is no such device.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from bench.align.ours import Ours
from bench.align.workloads import Sizes, build_mini
from bench.generate.clock import NoClock
from bench.generate.models import MODELS, load_model
from bench.generate.report import name_machine, name_whole_commit
from bench.generate.rows import round_to
from bench.generate.workloads import build_workloads
from bench.rows import RESULTS, append_rows
from realign.cli.__main__ import main as run_command
from realign.cli.verify import check_device
from realign.evals.golden import relative_error
from realign.evals.parity import check_golden
from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.runtime import graphs
from realign.runtime.engine import Engine
from realign.runtime.request import Request, Sample
from realign_kernels import native
from train.recipe import Guards, Recipe
from train.update import Stopped

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/fixtures/bagel-tiny"
CUDA_OP_TESTS = ROOT / "tests/kernels/test_guided_flow_step_cuda.py"
DTYPES = ("float32", "bfloat16")
TIMESTEPS, SAMPLES = 20, 2  # enough steps with guidance, and without, for both kinds to be replayed
RATIO_SIZES = Sizes(prompts=2, group=4)
RECIPES = sorted((ROOT / "train/recipes").glob("bagel-7b-rga-*.toml"))


@dataclass(frozen=True)
class Place:
    """Where a check is made."""

    device: torch.device
    dtype: str
    model: str

    def load(self) -> Bagel:
        """The model, loaded or made."""
        return load_model(self.model, self.device, getattr(torch, self.dtype))

    @property
    def is_exact(self) -> bool:
        """Whether all that is promised of one machine's float32 holds: on a CPU."""
        return self.device.type == "cpu" and self.dtype == "float32"


@dataclass(frozen=True)
class Figure:
    """What was found. `bound`: what it may be at most; None where nothing is promised, only said. What is no
    number is above every bound.
    """

    what: str
    measured: float
    bound: float | None = None

    @property
    def is_kept(self) -> bool:
        return self.bound is None or self.measured <= self.bound


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """A figure, of a check that took so many seconds in all."""

    check: str
    what: str
    measured: float
    bound: float | None
    is_kept: bool
    seconds: float
    model: str
    dtype: str
    machine: str
    torch: str
    commit: str


def check_parity(place: Place) -> Iterator[Figure]:
    """With the recorded outputs of the reference implementation."""
    results = check_golden(GOLDEN, str(place.device), getattr(torch, place.dtype))
    yield Figure(f"largest error of {len(results)} cases, over its tolerance", max_share(results), 1.0)


def max_share(results: Sequence) -> float:
    """The largest error, over the tolerance of its case; of a case whose tolerance is 0, the error. NaN if
    one is.
    """
    shares = [one.max_error / one.tolerance if one.tolerance else one.max_error for one in results]
    return float(np.max(shares))


def check_independence(place: Place) -> Iterator[Figure]:
    """Samples alone, together, and in another order: on a GPU and in bfloat16 said, not promised."""
    model = place.load()
    engine = Engine(model, PROGRAMS)
    requests = [request for some in mix_requests(model).values() for request in some]
    alone = [sample for request in requests for sample in engine.run([request])]
    for how, order in (("together", requests), ("in another order", requests[::-1])):
        texts, latents = compare(alone, engine.run(order))
        yield Figure(f"share of texts that differ, {how}", texts, 0.0 if place.is_exact else None)
        yield Figure(f"latents' difference, relative, {how}", latents, 1e-5 if place.is_exact else None)


def check_graphs(place: Place) -> Iterator[Figure]:
    """Recorded steps against launched ones, workload by workload: the same kernels, so the same bits."""
    if place.device.type not in graphs.CAPTURED_DEVICES:
        return
    model = place.load()
    engine = Engine(model, PROGRAMS)
    for name, requests in mix_requests(model).items():
        with mock.patch.object(graphs, "CAPTURED_DEVICES", ()):
            launched = engine.run(requests)
        with count_replays() as replays:
            texts, latents = compare(launched, engine.run(requests))
        yield Figure(f"{name}: share of texts that differ from launched steps'", texts, 0.0)
        yield Figure(f"{name}: latents' difference from launched steps', relative", latents, 0.0)
        yield Figure(f"{name}: whether no step was replayed", float(not replays), 0.0)


@contextlib.contextmanager
def count_replays() -> Iterator[list[graphs.CapturedStep]]:
    """A list that gets every step that is replayed meanwhile."""
    call, replays = graphs.CapturedStep.__call__, []

    def watch(step: graphs.CapturedStep) -> object:
        result = call(step)
        if step.graph is not None:
            replays.append(step)
        return result

    with mock.patch.object(graphs.CapturedStep, "__call__", watch):
        yield replays


def check_ratio(place: Place) -> Iterator[Figure]:
    """An iteration of alignment on mini: ratios before its first update. On a CPU in float32 they are one in
    the rollout's own packing; else a tenth of the smallest clip range that a recipe for BAGEL-7B has is
    allowed.
    """
    if place.model != "mini":
        return
    allowed = min(Recipe.load(path).update.clip_low for path in RECIPES) / 10
    for variant in ("unguided", "guided"):
        for packing in ("rollout", "dense"):
            recipe = build_mini(variant, RATIO_SIZES)
            recipe = replace(
                recipe,
                dtype=place.dtype,
                update=replace(recipe.update, packing=packing),
                guards=Guards(ratio=1e9, spread=0.0),  # this check says what a guard would stop for
            )
            ours = Ours(recipe, place.device, keeps_gradients=False)
            bound = 0.0 if place.is_exact and packing == "rollout" else allowed
            what = f"first ratios off one, {variant}, packed as {packing}"
            try:
                yield Figure(what, ours.iterate(NoClock()).ratio_error, bound)
            except Stopped as stopped:
                yield Figure(f"{what}: {stopped}", math.inf, bound)


def check_commands(place: Place) -> Iterator[Figure]:
    """`realign generate` and `score`, as people type them; they choose the dtype."""
    if place.model != "mini" or place.dtype != DTYPES[0]:
        return
    with tempfile.TemporaryDirectory() as name:
        prompts, out = Path(name) / "prompts.txt", Path(name) / "out"
        prompts.write_text("a small red circle at the top left\na large blue star in the centre\n")
        device = ["--device", str(place.device)]
        commands = [
            ["generate", str(prompts), "--out", str(out), "--reasoning", "ic-cot", *device],
            ["score", str(out), "--reward", "clip:mini+format", *device],
        ]
        for command in commands:
            yield Figure(f"exit code of realign {command[0]}", run_command(command), 0)


def check_memory(place: Place) -> Iterator[Figure]:
    """The CUDA kernel's accesses, barriers and races, by CUDA's `compute-sanitizer`, on the tests that run it
    on the GPU. Every tensor has memory of its own, so that what lies beyond is nobody's.
    """
    if place.device.type != "cuda" or place.dtype != DTYPES[0] or not native.has_cuda():
        return
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if tool is None:
        yield Figure("compute-sanitizer is not on the path, nor in CUDA_HOME", math.nan, 0)
        return
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "gpu", str(CUDA_OP_TESTS)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in ("memcheck", "racecheck", "synccheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9", *tests]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        yield Figure(f"exit code of {kind}", done.returncode, 0)


CHECKED = {"parity": GOLDEN.name, "commands": "mini", "memory": "guided_flow_step"}  # whatever the model
CHECKS: dict[str, Callable[[Place], Iterator[Figure]]] = {
    "parity": check_parity,
    "ratio": check_ratio,
    "independence": check_independence,
    "graphs": check_graphs,
    "commands": check_commands,
    "memory": check_memory,
}


def mix_requests(model: Bagel) -> dict[str, list[Request]]:
    """Text to image, four references with guidance, and chains: of each two samples, by workload."""
    requests = {}
    for name, variant in (("W2", "batch 2"), ("W3", "guided"), ("W4", "guided")):
        workloads = build_workloads(model.config, name)
        chosen = next(one.requests for one in workloads if one.variant == variant)[:SAMPLES]
        requests[name] = [
            replace(one, settings=replace(one.settings, num_timesteps=TIMESTEPS)) for one in chosen
        ]
    return requests


def compare(samples: Sequence[Sample], others: Sequence[Sample]) -> tuple[float, float]:
    """The share whose texts differ, and of those that wrote the same the largest difference of latents: NaN
    if there are none, or one is.
    """
    by_id = {other.request.id: other.trajectory for other in others}
    pairs = [(sample.trajectory, by_id[sample.request.id]) for sample in samples]
    alike = [(one, other) for one, other in pairs if one.text_turns == other.text_turns]
    errors = [relative_error(one.latent_LC.float(), other.latent_LC.float()) for one, other in alike]
    return 1 - len(alike) / len(pairs), float(np.max(errors)) if errors else math.nan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        device = torch.device(check_device(options.device))
    except ValueError as error:
        print(f"bench.check: {error}", file=sys.stderr)
        return 2
    is_kept = True
    for dtype in options.dtype:
        place = Place(device, dtype, options.model)
        for name in options.check:
            begin = time.monotonic()
            figures = list(CHECKS[name](place))
            append_rows(make_rows(name, place, figures, time.monotonic() - begin), options.out)
            lines = [describe(name, place, figure) for figure in figures]
            print("\n".join(lines) or f"{name:12} {dtype:8}  not here", flush=True)
            is_kept = is_kept and all(figure.is_kept for figure in figures)
    return int(not is_kept)


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m bench.check`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (cpu)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help=" ".join(DTYPES))
    parser.add_argument("--check", nargs="+", choices=CHECKS, default=list(CHECKS), help=" ".join(CHECKS))
    parser.add_argument("--model", choices=MODELS, default="mini")
    parser.add_argument("--out", type=Path, default=RESULTS / "check.jsonl", help="where rows are appended")
    return parser


def make_rows(check: str, place: Place, figures: Sequence[Figure], seconds: float) -> list[CheckRow]:
    """A row for each figure."""
    return [
        CheckRow(
            check=check,
            what=figure.what,
            measured=round_to(figure.measured, 3),
            bound=figure.bound,
            is_kept=figure.is_kept,
            seconds=round(seconds, 1),
            model=CHECKED.get(check, place.model),
            dtype=place.dtype,
            machine=name_machine(place.device),
            torch=torch.__version__,
            commit=name_whole_commit(),
        )
        for figure in figures
    ]


def describe(check: str, place: Place, figure: Figure) -> str:
    """A figure for people."""
    bound = "nothing promised" if figure.bound is None else f"at most {figure.bound:g}"
    verdict = "" if figure.bound is None else ("  ok" if figure.is_kept else "  BROKEN")
    return f"{check:12} {place.dtype:8}  {figure.what}: {figure.measured:.3g} ({bound}){verdict}"


if __name__ == "__main__":
    sys.exit(main())
