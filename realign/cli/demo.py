"""`realign demo`: the main job on prompts of the procedural world, drawn here, on the embedded mini model."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from realign.cli.console import UsageError, print_refusal
from realign.cli.files import Staging, dump_line
from realign.cli.fits import check_given_size
from realign.cli.folder import HIDDEN, check_empty
from realign.cli.generate import resolve_device, run_command
from realign.cli.models import ModelFolder
from realign.cli.options import RunOptions, add_run_arguments
from realign.cli.processes import current_process
from realign.world.tasks import WorldSample, sample

PROMPTS_FOLDER, PROMPTS_FILE = "prompts", "prompts.jsonl"
# Tasks of the world in the order of the demo's prompts, repeated; scenes that no model was trained on.
TASKS = ("in_context", "edit", "in_context", "t2i", "edit", "in_context")
SPLIT = "test"


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "demo",
        help="a batch of interleaved prompts on the embedded mini model",
        description="Draw prompts with reference pictures, and answer them: reasoning, then a picture.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="the folder of this run (demo)")
    parser.add_argument("--num-prompts", type=int, default=24, metavar="N", help="how many (24)")
    add_run_arguments(parser)
    parser.set_defaults(reasoning="ic-cot", steps=25, format="jsonl", prompts=None)
    return parser


def main(args: argparse.Namespace) -> int:
    args.prompts = Path(args.out) / PROMPTS_FOLDER / PROMPTS_FILE
    options = RunOptions.from_args(args)
    try:
        # What can be refused without prompts is refused before there are any.
        if not current_process().is_alone:
            raise UsageError("demo: runs in one process; start several with realign generate")
        options.check()
        resolve_device(options.device, options.dtype)
        check_given_size(options.picture, ModelFolder.find(options.model).config)
        write_prompts(options.out, args.num_prompts)
    except UsageError as error:
        print_refusal(error)
        return 2
    return run_command(options, allowed=(PROMPTS_FOLDER,))


def write_prompts(out: Path, num_prompts: int) -> Path:
    """Draw the prompts into `out/prompts`, unless they are there; returns their file. Raises UsageError."""
    if num_prompts < 1:
        raise UsageError(f"--num-prompts {num_prompts}: give at least 1")
    if out.is_dir() and not (out / "run.json").exists():
        check_empty(out, (PROMPTS_FOLDER,))
    drawn = [sample(TASKS[i % len(TASKS)], i, split=SPLIT) for i in range(num_prompts)]
    lines = "".join(dump_line(_describe(index, one)) for index, one in enumerate(drawn))
    folder = out / PROMPTS_FOLDER
    path = folder / PROMPTS_FILE
    if path.exists() and path.read_text(encoding="utf-8") == lines:
        return path
    if path.exists():
        raise UsageError(f"--out {out}: holds other prompts than these; name another folder")
    try:
        _write(folder, drawn, lines)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made ({error.strerror}); choose another") from error
    return path


def _write(folder: Path, drawn: list[WorldSample], lines: str) -> None:
    """The pictures first: where the file of prompts is, all is."""
    staging = Staging(folder.parent / HIDDEN / "tmp")
    for index, one in enumerate(drawn):
        for number, reference in enumerate(one.references, start=1):
            image = Image.fromarray(np.asarray(reference.picture, dtype=np.uint8))
            staging.write(
                folder / _picture_name(index, number), lambda file, image=image: image.save(file, "PNG")
            )
    staging.write_text(folder / PROMPTS_FILE, lines)


def _describe(index: int, drawn: WorldSample) -> dict[str, object]:
    """A line of the prompt file: the references in their order, then the instruction that numbers them."""
    pictures = [{"image": _picture_name(index, number)} for number in range(1, len(drawn.references) + 1)]
    return {"id": _prompt_id(index), "prompt": [*pictures, {"text": drawn.text}]}


def _prompt_id(index: int) -> str:
    return f"{index:02d}-{TASKS[index % len(TASKS)]}"


def _picture_name(index: int, number: int) -> str:
    return f"{_prompt_id(index)}-image-{number}.png"
