"""Recipes of small runs, and runs of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from realign.model.bagel import Bagel
from realign.model.config import ResizeRule
from train.recipe import Recipe

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "fixtures" / "bagel-tiny" / "checkpoint"

SMALL_PICTURES = "the tiny checkpoint, references of 32 pixels"

BASE: dict[str, Any] = {
    "start": str(CHECKPOINT),
    "reward": "function:tests.train.rewards:brightness",
    "iterations": 2,
    "checkpoint_every": 1,
    "data": {"tasks": ["t2i"], "num_prompts": 3},
    "rollout": {
        "prompts": 2,
        "group": 3,
        "reasoning": "none",
        "height": 32,
        "width": 32,
        "num_timesteps": 5,
        "max_tokens": 8,
    },
    "window": {"rule": "cps", "level": 0.8, "size": 2},
    "update": {"learning_rate": 1e-3, "clip_low": 0.2, "clip_high": 0.2},
}
# Everything at once: chains, references, guidance, two updates of an iteration, a reference policy.
FULL: dict[str, Any] = {
    "start": SMALL_PICTURES,
    "data": {"tasks": ["in_context", "t2i"]},
    "rollout": {"reasoning": "ic-cot", "text_scale": 3.0, "image_scale": 1.5},
    "window": {"rule": "flow-grpo", "level": 0.9},
    "update": {"updates": 2, "kl_beta": 0.01, "ema_decay": 0.9, "guard": True},
}


def write_recipe(path: Path, *changes: dict[str, Any]) -> Path:
    """`BASE` with changes to it, as TOML."""
    tables = json.loads(json.dumps(BASE))
    for change in changes:
        for name, value in change.items():
            tables[name] = {**tables.get(name, {}), **value} if isinstance(value, dict) else value
    if tables["start"] == SMALL_PICTURES:
        tables["start"] = str(save_small(path.parent / "start"))
    lines = [f"{name} = {json.dumps(value)}" for name, value in tables.items() if not isinstance(value, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines))
    return path


def save_small(folder: Path) -> Path:
    """The tiny checkpoint with resize rules that its few places hold."""
    if not folder.exists():
        model = Bagel.from_pretrained(CHECKPOINT)
        model.config = replace(
            model.config, vae_resize=ResizeRule(32, 16, 8), vit_resize=ResizeRule(28, 14, 14)
        )
        model.save_pretrained(folder)
    return folder


def build_recipe(folder: Path, *changes: dict[str, Any]) -> Recipe:
    return Recipe.load(write_recipe(folder / "recipe.toml", *changes))


def start(recipe: Path, out: Path, launcher: Sequence[str] = (), **options: Any) -> subprocess.Popen:
    """The command, in a process of its own, or of a launcher's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        *launcher,
        "train.rga",
        str(recipe),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    return subprocess.Popen(command, env=environment, cwd=ROOT, **options)


def find_launcher(processes: int) -> tuple[str, ...]:
    """torchrun for processes of this machine, at a port that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ("torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}", "-m")


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def read_weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "ema.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = read_weights(one), read_weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
