"""`realign generate`: a file of prompts to a folder of pictures, with their records and a gallery.

Everything is checked before the folder is made. The same command again goes on where the last one stopped.
Started as several processes, by torchrun say, they share the work and the folder (see `processes`).
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import realign
from realign.cli.console import (
    OwnUsageError,
    RunError,
    UsageError,
    print_error,
    print_note,
    print_own_note,
    print_refusal,
    print_warning,
)
from realign.cli.fits import check_given_size, check_lengths, check_sizes
from realign.cli.folder import RunFolder
from realign.cli.gallery import write_gallery
from realign.cli.job import Job, bound_stream, build_tasks, cut_batches
from realign.cli.layout import Task, build_layout
from realign.cli.models import ModelFolder
from realign.cli.options import PROMPT_FORMATS, RunOptions, add_run_arguments
from realign.cli.processes import ALONE, Process, current_process
from realign.data.readers import PromptError, PromptFile, Reference, load_references, read_prompts
from realign.gallery.pages import page_name

if TYPE_CHECKING:
    from realign.runtime.engine import Engine

# Pictures that a process takes as its own at a time; and at a time with an engine that is compared.
DEFAULT_BATCH_SIZE = 16
LIBRARIES = ("torch", "transformers", "safetensors", "pillow", "numpy")


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "generate",
        help="pictures from a file of prompts",
        description="Make the pictures of a file of prompts. The same command again goes on.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "prompts", metavar="PROMPTS", help=".txt, .jsonl, or GenEval's metadata with --format geneval"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the folder of this run; made if it is not there"
    )
    parser.add_argument("--format", default="auto", choices=PROMPT_FORMATS, help="default: by the extension")
    add_run_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> int:
    return run_command(RunOptions.from_args(args))


def run_command(options: RunOptions, allowed: tuple[str, ...] = ()) -> int:
    """Run a whole command; returns its exit code. `allowed`: entries that a new folder may hold already."""
    process = current_process()
    try:
        run = PreparedRun.check(options, process, allowed)
        return run.execute()
    except (UsageError, PromptError) as error:
        print_refusal(error)
        return 2
    except KeyboardInterrupt:
        print_note(f"stopped; what is done is in {options.out}; run the same command again to go on")
        return 130
    except (RunError, OSError) as error:
        how = f"what is done is in {options.out}; run the same command again to go on"
        print_error(process.name_in(f"{error}; {how}"))
        return 1


@dataclass(frozen=True)
class PreparedRun:
    """A command that has passed every check, before anything is written or loaded."""

    options: RunOptions
    process: Process
    prompts: PromptFile
    references: Mapping[Path, Reference]
    model: ModelFolder
    device: str
    dtype: str
    folder: RunFolder

    @classmethod
    def check(cls, options: RunOptions, process: Process, allowed: tuple[str, ...] = ()) -> PreparedRun:
        """Raises PromptError or UsageError for whatever would not work."""
        prompts, references, model, device, dtype = check_inputs(options, process)
        settings = {
            **options.picture.as_json(),
            "format": prompts.format,
            "device": device.partition(":")[0],
            "dtype": dtype,
            "prompts_sha256": prompts.sha256,
            "references_sha256": _hash_references(prompts, references),
            "model_fingerprint": model.fingerprint(),
            "fp8_sha256": None
            if options.fp8 is None
            else hashlib.sha256(options.fp8.read_bytes()).hexdigest(),
        }
        layout = build_layout(prompts.format, options.picture.num_images)
        folder = RunFolder(options.out, layout, settings, process, allowed)
        folder.check()
        warn_untrained(options.picture.reasoning, model)
        return cls(options, process, prompts, references, model, device, dtype, folder)

    def execute(self) -> int:
        tasks = build_tasks(self.prompts, self.options.picture.num_images)
        # A new folder is made only once the weights are known to load.
        engine = None if self.folder.is_started else self.load_engine()
        with self.folder.open(self.describe(), tasks) as done:
            pending = [task for task in tasks if task.request_id not in done]
            if pending:
                self._make(pending, len(done), engine or self.load_engine())
            self._complete(tasks)
        if self.process.is_first:
            page = self.folder.path / page_name(1)
            print(f"{len(tasks)} pictures ({len(pending)} new) in {page.parent}; look at them in {page}")
        return 0

    def _make(self, pending: Sequence[Task], num_done: int, engine: Engine) -> None:
        batch_size = self.options.batch_size
        there = f", {num_done} are there already" if num_done else ""
        several = "" if self.process.is_alone else f", {self.process.world_size} processes"
        where = f"{self.device.partition(':')[0]}, {self.dtype}, attention {engine.backend.name}"
        how = f"{batch_size or 'as many as fit'} at a time, {where}{several}"
        print_note(f"{len(pending)} pictures to make{there}; {how}")
        job = Job(self.prompts, self.references, self.options.picture, self.folder)
        share = ceil(len(pending) / self.process.world_size)
        batches = cut_batches(pending, min(batch_size or DEFAULT_BATCH_SIZE, share))
        engine.report = lambda text: print_own_note(self.process.name_in(text))
        job.run(batches, num_done, engine, bound_stream(batch_size, share, self.process))

    def _complete(self, tasks: Sequence[Task]) -> None:
        """Bring the finished run together, unless another process has."""
        with self.folder.claims.door():
            if not self.folder.claims.is_complete():
                self.folder.gather_records(tasks)
                write_gallery(self.folder.path)
                self.folder.claims.complete()

    def load_engine(self) -> Engine:
        """Load the weights; raises UsageError where they are damaged or do not fit."""
        return load_engine(self.options, self.model, self.device, self.dtype, self.options.fp8)

    def describe(self) -> dict[str, Any]:
        """What `run.json` says beside the settings: for people, not compared."""
        return {
            "version": realign.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": {"name": self.model.name, "path": str(self.model.path.resolve())},
            "prompts": {"file": str(self.options.prompts.resolve()), "count": len(self.prompts.entries)},
            "versions": {"python": platform.python_version(), **_library_versions()},
        }


def check_inputs(
    options: RunOptions, process: Process = ALONE
) -> tuple[PromptFile, Mapping[Path, Reference], ModelFolder, str, str]:
    """Prompts, their pictures, the model, device and dtype of a command; all of it fits together.

    Raises PromptError or UsageError.
    """
    options.check()
    prompts = read_prompts(options.prompts, options.format)
    references = load_references(prompts)
    device, dtype = resolve_device(options.device, options.dtype, process)
    model = ModelFolder.find(options.model)
    check_given_size(options.picture, model.config)
    check_sizes(options.picture, model.config, prompts, references)
    check_lengths(model, prompts, options.picture.reasoning)
    if options.fp8 is not None:
        check_fp8(options.fp8, model)
    return prompts, references, model, device, dtype


def check_fp8(path: Path, model: ModelFolder) -> None:
    """Raises UsageError where `--fp8` names no scales of the model."""
    from realign.model.fp8 import Fp8Scales

    try:
        Fp8Scales.load(path).check_model(model.fingerprint())
    except ValueError as error:
        raise UsageError(f"--fp8 {path}: {error}") from error


def load_engine(
    options: RunOptions, model: ModelFolder, device: str, dtype: str, fp8: Path | None = None
) -> Engine:
    """Load the weights; raises UsageError where they are damaged or do not fit, or attention cannot run."""
    import torch

    from realign.api import find_dtype, load
    from realign.runtime.attention import find_backend

    try:
        find_backend(torch.device(device), find_dtype(dtype), options.attention)
    except ValueError as error:
        raise UsageError(f"--attention {options.attention}: {error}") from error

    if ":" in device:  # what names no device is to be there too
        torch.cuda.set_device(device)
    try:
        engine = load(model.path, device, dtype, options.attention, fp8).engine
    except ValueError as error:
        raise UsageError(f"--model {model.name}: {error}") from error
    if options.memory_gb is not None:
        engine.memory_bytes = int(options.memory_gb * 2**30)
    return engine


def resolve_device(device: str, dtype: str, process: Process = ALONE) -> tuple[str, str]:
    """The device and dtype meant by 'auto', and a check that the named ones exist; of several processes each
    has a CUDA device to itself, unless one is named by its number. Raises UsageError.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: give auto, cpu, cuda or cuda:N")
    if device != "cpu":
        device = _find_cuda(device, process)
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    return device, dtype


def _find_cuda(device: str, process: Process) -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto" and not count:
        return "cpu"
    if int(device.partition(":")[2] or 0) >= count:
        raise UsageError(f"--device {device}: torch finds {count} CUDA devices here; give auto or cpu")
    if process.is_alone or ":" in device:
        return "cuda" if device == "auto" else device
    _check_devices(device, count, process)
    return f"cuda:{process.local_rank}"


def _check_devices(device: str, count: int, process: Process) -> None:
    """Raises UsageError where the processes of this machine are more than its devices."""
    mend = f"torch finds {count} CUDA devices here; start as many, or give cuda:N to share one"
    if (process.local_size or 0) > count:
        raise UsageError(f"--device {device}: for {process.local_size} processes {mend}")
    if process.local_rank >= count:
        raise OwnUsageError(f"--device {device}: for LOCAL_RANK {process.local_rank} {mend}")


def _hash_references(prompts: PromptFile, references: Mapping[Path, Reference]) -> str:
    pictures = (references[part.path].sha256 for entry in prompts.entries for part in entry.pictures)
    return hashlib.sha256("\n".join(pictures).encode()).hexdigest()


def warn_untrained(mode: str, model: ModelFolder) -> None:
    from realign.reasoning.programs import describe_untrained

    warning = describe_untrained(model.config, mode)
    if warning:
        print_warning(warning)


def _library_versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
