"""Entry of `realign` and `python -m realign.cli`.

Only the module of the subcommand that was asked for is imported, so that help is instant.
Exit codes: 0 done, 1 failed on the way, 2 refused before any work, 130 stopped by Ctrl-C,
141 nobody reads the output.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from realign import __version__
from realign.cli.console import print_error, print_note, print_refusal
from realign.cli.processes import current_process

COMMANDS = {
    "generate": "pictures from a file of prompts",
    "demo": "a batch of interleaved prompts on the embedded mini model",
    "gallery": "rebuild index.html of a folder that generate made",
    "verify": "check this implementation against recorded outputs of the reference one",
    "eval": "measure a model on a benchmark",
    "calibrate": "scales for fp8, from a file of prompts",
    "score": "score the pictures of a folder that generate made",
    "compare": "what a faster way to draw costs in quality",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose error is one line."""

    def error(self, message: str) -> NoReturn:
        print_refusal(f"{message}; see {self.prog} --help")
        sys.exit(2)


def build_parser(command: str | None) -> Parser:
    """The parser, with the arguments of `command` alone filled in."""
    parser = Parser(
        prog="realign", description="Interleaved prompts, structured reasoning, pictures.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"realign {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, summary in COMMANDS.items():
        if name == command:
            importlib.import_module(f"realign.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        current_process()
    except ValueError as error:
        print_error(error)
        return 2
    try:
        args = build_parser(command).parse_args(argv)
        code = importlib.import_module(f"realign.cli.{args.command}").main(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print_note("stopped")
        return 130
    except BrokenPipeError:
        # Who read our output has seen enough (`realign ... | head`); what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
