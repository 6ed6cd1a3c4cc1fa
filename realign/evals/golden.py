"""A golden folder on disk: what it holds, with one clear error where it does not."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


@dataclass(frozen=True)
class CaseResult:
    """One recorded output: the largest error found, and whether it is within the tolerance."""

    name: str
    max_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.max_error <= self.tolerance


class Record(dict):
    """A JSON object of cases.json; a field that is missing is the folder's fault."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"cases.json: the field {key!r} is missing, beside {', '.join(self) or 'nothing'}")


def read_cases(path: Path) -> Record:
    """The content of cases.json. Raises: ValueError where it cannot be read, or is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=Record)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): name a golden folder") from None
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON: {error}") from None
    if not isinstance(content, Record):
        raise ValueError(f"{path}: must be a JSON object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Inputs and outputs by name, on the CPU. Raises: ValueError where they cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file: name a golden folder")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None


def parse_part(text: str) -> tuple[str, int, list[str]]:
    """The kind, number and views of 'text:0', 'image:1' or 'image:1(vae,vit)'. Raises: ValueError."""
    match = re.fullmatch(r"(text|image):(\d+)(?:\((\w+(?:,\w+)*)\))?", text)
    if match is None:
        raise ValueError(f"cases.json: the part {text!r} must be as 'text:0' or 'image:0(vae,vit)'")
    return match.group(1), int(match.group(2)), (match.group(3) or "vae,vit").split(",")


def relative_error(ours: Tensor, golden: Tensor, least_scale: float = 0.0) -> float:
    """Largest difference relative to the largest recorded value; infinite for another shape.

    `least_scale` is for values that are small differences of large numbers: it is the size of those.
    """
    if ours.shape != golden.shape:
        return math.inf
    golden = golden.double()
    scale = golden.abs().max().clamp(min=least_scale)
    return float((ours.cpu().double() - golden).abs().max() / (scale if scale > 0 else 1.0))
