"""`realign generate` of a file of prompts against the baseline on some of them, with their PNGs."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.generate.baseline import Baseline, Made
from bench.generate.clock import Clock, NoClock, watch_engine
from bench.generate.measure import Measured, Run, take_turns
from realign.api import build_settings
from realign.cli.__main__ import main as run_realign
from realign.cli.job import build_request, build_tasks
from realign.cli.layout import build_layout
from realign.data.readers import PromptFile, load_picture, read_prompts
from realign.model.bagel import Bagel
from realign.runtime.request import Request
from realign.world.tasks import sample

NUM_PROMPTS = 553  # of GenEval
LARGEST_STEP = 1  # of 255, between pictures of latents that differ by rounding


@dataclass(frozen=True)
class PromptSet:
    """Prompts as `realign generate` reads them."""

    path: Path
    format: str
    prompts: PromptFile

    @classmethod
    def read(cls, path: Path) -> PromptSet:
        """GenEval's metadata is known by its fields, other files by their extension."""
        with path.open(encoding="utf-8") as file:
            name = "geneval" if '"include"' in file.readline() else "auto"
        return cls(path, name, read_prompts(path, name))

    def describe(self) -> str:
        """How many prompts of what: GenEval's are known by their format, others by their file's name."""
        source = "GenEval" if self.format == "geneval" else self.path.stem
        return f"{len(self.prompts.entries)} prompts of {source}"

    def build_requests(self) -> list[Request]:
        """What the command makes of them, with its own settings."""
        settings = build_settings()
        return [
            build_request(task, task.entry.seed or 0, settings, load_picture)
            for task in build_tasks(self.prompts, 1)
        ]


def write_world_prompts(path: Path, count: int = NUM_PROMPTS) -> Path:
    """So many text-to-image prompts of the world's test split, in place of GenEval's."""
    path.write_text("".join(f"{sample('t2i', index, split='test').text}\n" for index in range(count)))
    return path


def measure_command(model: Bagel, prompts: PromptSet, num_turns: int, num_baseline: int) -> Measured:
    """The whole command, its loading of the model included, and the baseline on prompts spread evenly.

    Raises: ValueError where a picture of the command is not the baseline's: then no time is worth a row.
    """
    requests = prompts.build_requests()
    chosen = choose_evenly(len(requests), num_baseline)
    some = [requests[index] for index in chosen]
    with tempfile.TemporaryDirectory() as folder:
        command = Command(prompts, Path(folder))
        measured = Measured(
            Run(command.run), Run(lambda clock: make_and_save(model, some, clock), len(requests) / len(some))
        )
        make_and_save(model, some[:1], NoClock())  # what happens once: the command does it in its time
        take_turns(measured, model.device, num_turns)
        pictures = command.read_pictures()
        check_pictures([pictures[index] for index in chosen], measured.baseline.made)
    return measured


def choose_evenly(total: int, count: int) -> list[int]:
    """Indexes spread over a list, the first among them."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


@dataclass
class Command:
    """`realign generate` of the prompts, each time into a folder of its own; the last one stays."""

    prompts: PromptSet
    folder: Path
    num_runs: int = 0

    @property
    def out(self) -> Path:
        """The folder of the last run."""
        return self.folder / str(self.num_runs)

    def run(self, clock: Clock | NoClock) -> list[Made]:
        """Makes all pictures, on the CPU; they stay in the folder.

        Raises: RuntimeError, with the command's last words, if it fails.
        """
        shutil.rmtree(self.out, ignore_errors=True)
        self.num_runs += 1
        arguments = ["generate", str(self.prompts.path), "--out", str(self.out), "--device", "cpu"]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), watch_engine(clock):
            code = run_realign([*arguments, "--format", self.prompts.format])
        if code != 0:
            raise RuntimeError(f"realign generate ended with {code}: {said.getvalue()[-500:]}")
        return []

    def read_pictures(self) -> list[Image.Image]:
        """In the order of the prompts."""
        layout = build_layout(self.prompts.prompts.format, 1)
        tasks = build_tasks(self.prompts.prompts, 1)
        return [load_picture(self.out / layout.picture_file(task)).image for task in tasks]


def make_and_save(model: Bagel, requests: Sequence[Request], clock: Clock | NoClock) -> list[Made]:
    """One request after the other, each picture saved as a PNG."""
    baseline, made = Baseline(model, clock=clock), []
    with tempfile.TemporaryDirectory() as folder:
        for number, request in enumerate(requests):
            made.append(baseline.run(request))
            with clock.phase("other"):
                made[-1].image.save(Path(folder) / f"{number}.png")
    return made


def check_pictures(pictures: Sequence[Image.Image], made: Sequence[Made]) -> None:
    """Raises: ValueError if a picture of the command is not the baseline's, up to rounding."""
    for number, (picture, other) in enumerate(zip(pictures, made, strict=True)):
        levels = (np.asarray(image).astype(int) for image in (picture, other.image))
        error = np.abs(np.subtract(*levels)).max()
        if error > LARGEST_STEP:
            raise ValueError(f"picture {number} of the command differs by {error} levels: no time counts")
