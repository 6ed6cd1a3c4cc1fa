"""`realign gallery`: make the pages of a run's folder again, also while the run is still going on."""

from __future__ import annotations

import argparse
from pathlib import Path

from realign.cli.console import UsageError, print_error
from realign.cli.files import Staging
from realign.cli.folder import HIDDEN, load_records, load_run
from realign.cli.scores import add_scores
from realign.gallery.pages import build_pages


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser("gallery", help="rebuild index.html of a folder that generate made")
    parser.add_argument("folder", metavar="DIR", help="the folder of a generate run, finished or not")
    return parser


def main(args: argparse.Namespace) -> int:
    try:
        print(write_gallery(Path(args.folder)))
    except UsageError as error:
        print_error(error)
        return 2
    except OSError as error:
        print_error(error)
        return 1
    return 0


def write_gallery(folder: Path) -> Path:
    """Write the pages from `run.json` and the records; returns the first. Raises UsageError."""
    run = load_run(folder)
    staging = Staging(folder / HIDDEN / "tmp")
    for name, html in build_pages(run, add_scores(load_records(folder).values(), folder)):
        staging.write_text(folder / name, html)
    return folder / "index.html"
