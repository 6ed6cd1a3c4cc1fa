"""A tiny checkpoint and prompt files to run the real command on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from realign.cli.generate import PreparedRun
from tests.cli.quick import QuickEngine
from tests.cli.support import CHECKPOINT, Workplace

TINY_CONFIG = {
    "vae_resize": {"max_size": 64, "min_size": 16, "stride": 8},
    "vit_resize": {"max_size": 56, "min_size": 28, "stride": 14},
    "default_image_size": [16, 24],
    "reasoning_modes": ["none", "ic-cot"],
    "name": "tiny",
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's checkpoint, with resize rules and a size of its own that fit it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    for path in CHECKPOINT.iterdir():
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **TINY_CONFIG}))
    return folder


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Workplace:
    return Workplace(tmp_path, tiny_model, capsys)


@pytest.fixture
def mixed(place: Workplace) -> Path:
    """Prompts of every kind: text, interleaved, several pictures, an own seed."""
    place.write_picture("a.png")
    place.write_picture("bb.png", (48, 22))
    return place.write_prompts(
        {"id": "plain", "prompt": "a red <b>star</b> & \"more\""},
        {"id": "two", "prompt": [{"text": "put"}, {"image": "a.png"}, {"text": "on"}, {"image": "bb.png"}]},
        {"id": "红星", "prompt": [{"image": "a.png"}, {"text": "again\u2028and again"}], "seed": 7},
        {"id": "last", "prompt": "a blue ring"},
    )  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreparedRun, "load_engine", lambda self: QuickEngine())
