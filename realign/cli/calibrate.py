"""`realign calibrate`: the scales that fp8 needs, found by running a file of prompts."""

from __future__ import annotations

import argparse

from realign.cli.compare import build_requests, check_out
from realign.cli.console import RunError, UsageError, print_error, print_note
from realign.cli.generate import DEFAULT_BATCH_SIZE, check_inputs, load_engine
from realign.cli.job import shortage_is_said
from realign.cli.options import PROMPT_FORMATS, RunOptions, add_run_arguments
from realign.data.readers import PromptError


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `calibrate` and its arguments."""
    parser = subparsers.add_parser(
        "calibrate",
        help="scales for fp8, from a file of prompts",
        description="Run prompts and write the scales of what the generation expert's linears read, for "
        "--fp8. Give some tens of prompts, and the settings, that are like those to come.",
        allow_abbrev=False,
    )
    parser.add_argument("prompts", metavar="PROMPTS", help="as of realign generate")
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON file of scales")
    parser.add_argument("--format", default="auto", choices=PROMPT_FORMATS, help="default: by the extension")
    add_run_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run the prompts; returns the exit code."""
    try:
        run(RunOptions.from_args(args))
    except (UsageError, PromptError) as error:
        print_error(error)
        return 2
    except (RunError, OSError) as error:
        print_error(error)
        return 1
    print(f"scales of the generation expert in {args.out}; `realign compare --fp8` measures what they cost")
    return 0


def run(options: RunOptions) -> None:
    """Check, run, write the file.

    Raises UsageError or PromptError for what cannot be done, RunError where it fails.
    """
    if options.fp8 is not None:
        raise UsageError(f"--fp8 {options.fp8}: scales are found without fp8: leave it out")
    check_out(options.out)
    prompts, _, model, device, dtype = check_inputs(options)
    requests = build_requests(prompts, options)
    engine = load_engine(options, model, device, dtype)
    from realign.model.fp8 import Fp8Scales, recording_inputs  # imported late: it brings torch

    print_note(f"{len(requests)} pictures to draw; {device}, {dtype}")
    size = options.batch_size or DEFAULT_BATCH_SIZE
    with shortage_is_said(), recording_inputs(engine.model) as find_scales:
        for start in range(0, len(requests), size):
            engine.run(requests[start : start + size])
        try:
            layers = find_scales()
        except ValueError as error:
            raise RunError(f"no scales: {error}") from error
    Fp8Scales(model.fingerprint(), layers).save(options.out)
