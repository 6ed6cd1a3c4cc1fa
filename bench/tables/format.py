"""Numbers and rows as the tables have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bench.rows import RESULTS

Row = Mapping[str, Any]


def format_rate(rate: float) -> str:
    """Three digits; from a thousand on in hundreds."""
    return f"{rate:.3g}" if rate < 1000 else f"{round(rate, -2):,.0f}"


def format_share(share: Mapping[str, Any], name: str = "all_right") -> str:
    """A share and its standard error."""
    return f"{share[name]:.3f} +- {share['se']:.3f}".replace("0.", ".")


def read_json(name: str) -> list[Row]:
    """The rows of a file."""
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
