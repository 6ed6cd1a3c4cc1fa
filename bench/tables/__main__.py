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
BLOCK = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)
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
    try:
        after = fill(before)
    except KeyError as error:
        print(
            f"bench.tables: {options.readme} asks for rows {error}: not one of {', '.join(TABLES)}",
            file=sys.stderr,
        )
        return 2
    options.readme.write_text(after, encoding="utf-8")
    print(f"{options.readme}: {'as it was' if after == before else 'written'}")
    return 0


def fill(page: str) -> str:
    """The page with its tables as the rows are now. Raises: KeyError for a table there is none of."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page)


if __name__ == "__main__":
    sys.exit(main())
