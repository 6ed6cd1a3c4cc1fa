"""`python -m bench.generate.soak`: memory over a long run of mini, on a CPU.

Requests go through one `Engine.stream`: text to image, in-context generation and editing with reasoning at
temperature 1, in several sizes; each has a prompt, and references, of its own. After every hundred samples a
row says what the process holds. Exit code 1 if it grew over the last half of the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from bench.generate.models import load_model
from bench.generate.report import Conditions, name_machine
from bench.rows import RESULTS
from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.memory import read_held_mb
from realign.runtime.request import Prompt, Request
from realign.runtime.settings import Settings, TextSettings
from realign.world.tasks import sample

NUM_REQUESTS, EVERY, NUM_TIMESTEPS = 2000, 100, 8
KINDS = (("t2i", "none"), ("in_context", "ic-cot"), ("t2i", "none"), ("edit", "ic-cot"))
SIZES = ((64, 64), (48, 64), (32, 32))
# A reference takes 0.1 MB as the model sees it, and 0.3 to 0.5 MB as keys and values: a third of one staying
# of every request would pass this in a thousand of them.
MOST_GROWTH_MB = 32.0


@dataclass(frozen=True, kw_only=True)
class SoakRow:
    """What the process held after so many samples.

    Attributes:
        resident_mb: of the process, weights and libraries included, after a collection of garbage.
        seconds: since the first request.
        timesteps: of every request.
    """

    samples: int
    resident_mb: float
    seconds: float
    timesteps: int
    model: str
    machine: str
    threads: int
    torch: str
    commit: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.generate.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS, help=f"({NUM_REQUESTS})")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (2)")
    out = RESULTS / "soak.jsonl"
    parser.add_argument("--out", type=Path, default=out, help=f"where rows are written anew ({out.name})")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    conditions = Conditions("mini", "float32", name_machine(cpu), options.threads)
    rows = []
    for row in soak(load_model("mini", cpu, torch.float32), options.requests, conditions):
        print(f"{row.samples} samples: {row.resident_mb:.1f} MB, {row.seconds:.0f} s", flush=True)
        rows.append(row)
    options.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    growth = find_growth([row.resident_mb for row in rows])
    is_flat = growth <= MOST_GROWTH_MB
    print(f"last half: {growth:+.1f} MB (at most {MOST_GROWTH_MB:g}): {'flat' if is_flat else 'NOT FLAT'}")
    return int(not is_flat)


def soak(model: Bagel, num_requests: int, conditions: Conditions) -> Iterator[SoakRow]:
    """A row after every `EVERY` samples."""
    begin = time.perf_counter()
    requests = map(build_request, range(num_requests))
    for count, _ in enumerate(Engine(model, PROGRAMS).stream(requests), 1):
        if count % EVERY == 0:
            gc.collect()
            yield SoakRow(
                samples=count,
                resident_mb=round(read_held_mb(), 1),
                seconds=round(time.perf_counter() - begin, 1),
                timesteps=NUM_TIMESTEPS,
                model=conditions.model,
                machine=conditions.machine,
                threads=conditions.threads,
                torch=conditions.torch,
                commit=conditions.commit,
            )


def build_request(number: int) -> Request:
    """Request `number` of the mix: no other has its prompt, or its references."""
    task, mode = KINDS[number % len(KINDS)]
    drawn = sample(task, number, split="test")
    text = TextSettings(160, temperature=1.0)
    settings = Settings(*SIZES[number % len(SIZES)], mode, NUM_TIMESTEPS, text=text)
    references = [Image.fromarray(reference.picture) for reference in drawn.references]
    for index, picture in enumerate(references):
        picture.putpixel((0, 0), (number % 256, number // 256, index))
    return Request(str(number), Prompt.build([*references, drawn.text]), number, settings)


def find_growth(held: Sequence[float]) -> float:
    """Of the last half of a run: its last quarter's median over that of the quarter before it.

    Raises: ValueError for fewer than four numbers.
    """
    quarter = len(held) // 4
    if not quarter:
        raise ValueError(f"{len(held)} rows: at least 4 are needed, {4 * EVERY} requests")
    return statistics.median(held[-quarter:]) - statistics.median(held[-2 * quarter : -quarter])


if __name__ == "__main__":
    sys.exit(main())
