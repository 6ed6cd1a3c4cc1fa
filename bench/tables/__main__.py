"""`python -m bench.tables`: the README's tables, made from the rows in `bench/results`.

A table stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`, and is written anew; a test holds
that nothing would change.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.tables.limits import build_limits
from bench.tables.results import build_ablation, build_generation, build_quality, build_ranking, build_world

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"(<!-- rows: (\w+) -->\n)((?!<!-- rows:).)*?(<!-- end of rows -->)", re.DOTALL)
MARK = re.compile(r"<!-- rows: (\w+) -->")
TABLES = {
    "generation": build_generation,
    "limits": build_limits,
    "quality": build_quality,
    "world": build_world,
    "ranking": build_ranking,
    "ablation": build_ablation,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--readme", type=Path, default=README, help="the page that is written")
    options = parser.parse_args(arguments)
    before = options.readme.read_text(encoding="utf-8")
    asked = MARK.findall(before)
    if unknown := [name for name in asked if name not in TABLES]:
        return _refuse(f"{options.readme} asks for rows {unknown[0]!r}: not one of {', '.join(TABLES)}")
    if len(BLOCK.findall(before)) < len(asked):
        return _refuse(f"{options.readme} has a table without <!-- end of rows -->: add it")
    try:
        after = fill(before)
    except OSError as error:
        return _refuse(f"{error.filename} is not there: make it first (README.md says how)")
    options.readme.write_text(after, encoding="utf-8")
    print(f"{options.readme}: {'as it was' if after == before else 'written'}")
    return 0


def _refuse(message: str) -> int:
    print(f"bench.tables: {message}", file=sys.stderr)
    return 2


def fill(page: str) -> str:
    """The page with its tables as the rows are now."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", page)


if __name__ == "__main__":
    sys.exit(main())
