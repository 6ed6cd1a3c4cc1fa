"""Run the command in a folder of its own, and read what it left."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realign.cli.__main__ import main

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "fixtures" / "bagel-tiny" / "checkpoint"


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Workplace:
    """A folder with a prompt file and pictures, and the command to run on it."""

    folder: Path
    model: Path
    capture: pytest.CaptureFixture[str]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def write_prompts(self, *rows: object, name: str = "prompts.jsonl") -> Path:
        path = self.folder / name
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    def write_picture(self, name: str, size: tuple[int, int] = (32, 32)) -> Path:
        values = np.random.default_rng(len(name)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(values).save(self.folder / name)
        return self.folder / name

    def run(self, *arguments: object) -> Outcome:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = self.capture.readouterr()
        return Outcome(code, captured.out, captured.err)

    def generate(self, prompts: Path, *arguments: object) -> Outcome:
        settings = ("--model", self.model, "--device", "cpu", "--steps", 3, "--max-reasoning-tokens", 8)
        return self.run("generate", prompts, "--out", self.out, *settings, *arguments)


def read_records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def read_pictures(folder: Path) -> dict[str, bytes]:
    """Every picture of a run, by its relative name; each is loaded, so that none is broken."""
    found = {}
    for path in sorted(folder.rglob("*.png")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith("refs/"):
            with Image.open(path) as image:
                image.load()
            found[name] = path.read_bytes()
    return found


def list_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
