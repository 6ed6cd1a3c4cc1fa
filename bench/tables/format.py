"""Numbers and rows as the tables have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bench.rows import RESULTS

Row = Mapping[str, Any]


def format_rate(rate: float) -> str:
    """Three digits; from a thousand on in hundreds."""
    return f"{rate:.3g}" if rate < 999.5 else f"{round(rate, -2):,.0f}"


def format_share(share: Mapping[str, Any], sign: str = "") -> str:
    """A share that is all right, and its standard error."""
    return f"{cut_zero(share['all_right'], sign)} +- {cut_zero(share['se'])}"


def cut_zero(share: float | None, sign: str = "") -> str:
    """`.994`; of a difference with `sign` "+", `+.762`; nothing for None."""
    return "" if share is None else f"{share:{sign}.3f}".replace("0.", ".", 1)


def read_json(name: str) -> list[Row]:
    """The rows of a file."""
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
