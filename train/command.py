"""The command line of alignment."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from train.recipe import Recipe


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """What `train.rga` takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--start", help="another checkpoint to begin from than the recipe's")
    parser.add_argument("--prompts", help="a file of prompts, as for realign generate, for the recipe's")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="other values than the recipe's, such as rollout.prompts=2 update.learning_rate=1e-5",
    )
    parser.add_argument("--iterations", type=int, help="another number of iterations than the recipe's")
    parser.add_argument(
        "--device", default="auto", help="such as cpu or cuda (default: cuda where there is one)"
    )
    # DeepSpeed's launcher gives it; the environment says it too.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def load_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that a command line names, with its changes. Raises: ValueError."""
    changes = list(args.set)
    if args.start is not None:
        changes.append(f"start={_quote(args.start)}")
    if args.prompts is not None:  # in the place of the world's tasks as well
        changes.append(f"data={{prompts={_quote(args.prompts)}}}")
    recipe = Recipe.load(args.recipe, changes)
    return recipe if args.iterations is None else replace(recipe, iterations=args.iterations)


def _quote(text: str) -> str:
    """As TOML has it: JSON's quotes, but none of its halves of a character."""
    return json.dumps(text, ensure_ascii=False)
