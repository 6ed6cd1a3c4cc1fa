"""Training state on disk: tensors in safetensors, numbers in JSON, each checkpoint complete or not there at
all.

A checkpoint is a folder `step-N`. It is written under a temporary name, flushed to disk and renamed, so a
kill at any moment leaves the last good one. No random state is stored: everything random in training here is
a function of (seed, step).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

TENSORS, NUMBERS = "state.safetensors", "state.json"


def save_state(folder: Path, step: int, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> Path:
    """Writes `folder/step-N` atomically and removes older ones but the last two."""
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary / TENSORS)
    (temporary / NUMBERS).write_text(json.dumps({**numbers, "step": step}))
    for path in (temporary / TENSORS, temporary / NUMBERS):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    for old in _checkpoints(folder)[:-2]:
        shutil.rmtree(old)
    return final


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole, or None. A torn one is passed over with a notice."""
    for path in reversed(_checkpoints(folder)):
        try:
            return load_file(path / TENSORS), json.loads((path / NUMBERS).read_text())
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            print(f"checkpoint {path} cannot be read ({error}); trying the one before", flush=True)
    return None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a line to a JSONL log."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def drop_rows_after(path: Path, step: int) -> None:
    """Takes back the rows of a log that a killed run wrote after its last checkpoint, at `step`."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    """A torn line, or a summary at the end, belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """AdamW's moments under the parameters' names (`names` maps id(parameter) to name)."""
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`."""
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, moment, name = key.split(".", 2)
            moments.setdefault(name, {})[moment] = value
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found = moments.get(names[id(parameter)], {})
            if found:
                optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in found.items()}
