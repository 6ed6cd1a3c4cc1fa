"""`realign compare`: the file it writes, its gate, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest
import torch

from realign.runtime.budget import MemoryShortage
from realign.runtime.engine import Engine
from tests.cli.support import Outcome, Workplace

FAST = ("--cache-interval", 3, "--cache-first", 2)


def compare(place: Workplace, *arguments: object) -> Outcome:
    prompts = place.write_prompts(
        {"id": "a", "prompt": "a star"}, {"id": "b", "prompt": "two rings", "seed": 4}
    )
    settings = ("--model", place.model, "--device", "cpu", "--steps", 8)
    return place.run("compare", prompts, "--out", place.folder / "found.json", *settings, *arguments)


def test_what_was_measured_is_printed_and_written(place: Workplace) -> None:
    outcome = compare(place, *FAST, "--min-psnr", 1, "--min-worst-psnr", 1)
    assert outcome.code == 0, outcome.err
    assert re.search(r"PSNR +mean [\d.]+ dB, worst [\d.]+ dB \([ab]/0\)\n", outcome.out)
    found = json.loads((place.folder / "found.json").read_text())
    assert found["settings"]["cache_interval"] == 3
    assert found["pictures"] == 2
    assert [one["id"] for one in found["by_picture"]] == ["a/0", "b/0"]
    errors = found["velocity_error"]["by_step"]
    assert [error < 1e-5 for error in errors] == [True, True, False, False, True, False, True]


class FakeEncoder:
    """A CLIP whose pictures and texts all point the same way, but for the first of each."""

    def __init__(self, spec: str, device: str) -> None:
        assert (spec, device) == ("some", "cpu")

    def encode_pictures(self, pictures: list) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]] + [[1.0, 1.0]] * (len(pictures) - 1))

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        assert texts == ["a star", "two rings"]
        return torch.tensor([[0.0, 1.0], [1.0, 1.0]])


def test_clip_scores_both(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realign.rewards.clip.ClipEncoder", FakeEncoder)
    outcome = compare(place, *FAST, "--clip", "some")
    assert "CLIP cosine      0.5000 plain, 0.5000 fast" in outcome.out
    found = json.loads((place.folder / "found.json").read_text())
    assert [one["scores"] for one in found["by_picture"]] == [
        [0.0, 0.0],
        [pytest.approx(1), pytest.approx(1)],
    ]


def test_too_little_memory_is_one_line(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self, requests):
        raise MemoryShortage("a request alone does not fit")

    monkeypatch.setattr(Engine, "run", run)
    outcome = compare(place, *FAST)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == "realign: error: a request alone does not fit"
    assert not (place.folder / "found.json").exists()


@pytest.mark.parametrize("option", ["--min-psnr", "--min-worst-psnr"])
def test_the_gate(place: Workplace, option: str) -> None:
    outcome = compare(place, *FAST, option, 99)
    assert outcome.code == 1
    assert re.search(rf"realign: error: PSNR is [\d.]+ dB: {option} asks for 99\n", outcome.err)
    assert (place.folder / "found.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing is drawn faster: give --fp8, --cache-interval or --reuse-guidance-below"),
        ((*FAST, "--min-psnr", "nan"), "--min-psnr nan: give a number of decibels"),
        ((*FAST, "--clip", "nowhere"), "--clip nowhere: clip 'nowhere': must be 'mini', a folder"),
        (
            (*FAST, "--out", "no/such/file.json"),
            "--out no/such/file.json: give the name of a file in a folder",
        ),
        ((*FAST, "--steps", 1), "--steps 1: give a number that is at least 2"),
        ((*FAST, "--model", "nowhere"), "--model nowhere: nowhere is not a folder"),
    ],
)
def test_what_cannot_be_compared(place: Workplace, arguments: tuple, message: str) -> None:
    outcome = compare(place, *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert re.search(rf"^realign: error: {message}", outcome.err, re.MULTILINE)
    assert not (place.folder / "found.json").exists()
