"""`realign calibrate` and `--fp8`: from prompts to scales to pictures, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import realign
from realign.model import fp8
from tests.cli.support import Outcome, Workplace, read_pictures

ROW = {"id": "a", "prompt": "a star"}


def calibrate(place: Workplace, *arguments: object) -> Outcome:
    settings = ("--model", place.model, "--device", "cpu", "--steps", 4)
    return place.run("calibrate", place.write_prompts(ROW), "--out", scales(place), *settings, *arguments)


def scales(place: Workplace) -> Path:
    return place.folder / "scales.json"


def test_from_prompts_to_scales_to_pictures(place: Workplace) -> None:
    outcome = calibrate(place)
    assert outcome.code == 0, outcome.err
    assert len(json.loads(scales(place).read_text())["layers"]) == 2
    prompts = place.write_prompts(ROW)
    assert place.generate(prompts).code == 0
    plain = read_pictures(place.out)
    refused = place.generate(prompts, "--fp8", scales(place))
    assert refused.code == 2
    assert re.search(r"holds another run: fp8_sha256 was null, is \"[0-9a-f]+", refused.err)
    other = place.generate(prompts, "--fp8", scales(place), "--out", place.folder / "fast")
    assert other.code == 0, other.err
    fast = read_pictures(place.folder / "fast")
    assert plain.keys() == fast.keys()
    assert plain != fast
    assert json.loads((place.folder / "fast" / "run.json").read_text())["settings"]["fp8_sha256"]


def test_in_python(place: Workplace) -> None:
    assert calibrate(place).code == 0
    generator = realign.load(place.model, device="cpu", fp8=scales(place))
    assert all(layer.fp8 is not None for layer in generator.model.decoder.layers)
    assert len(generator.generate(["a star"], steps=3)) == 1


def test_compared_with_the_plain_model(place: Workplace) -> None:
    assert calibrate(place).code == 0
    out = place.folder / "found.json"
    settings = ("--model", place.model, "--device", "cpu", "--steps", 4)
    arguments = ("--out", out, "--fp8", scales(place), *settings)
    outcome = place.run("compare", place.write_prompts(ROW), *arguments)
    assert outcome.code == 0, outcome.err
    found = json.loads(out.read_text())
    assert found["fp8"] == str(scales(place))
    assert all(0 < error < 0.5 for error in found["velocity_error"]["by_step"])


@pytest.mark.parametrize("command", ["generate", "compare", "calibrate"])
def test_what_is_refused(place: Workplace, command: str) -> None:
    prompts = place.write_prompts(ROW)
    settings = ("--out", place.folder / "new", "--model", place.model, "--device", "cpu", "--steps", 3)
    (place.folder / "text.json").write_text("no")
    other = {"model": "0" * 64, "layers": []}
    (place.folder / "other.json").write_text(json.dumps(other))
    messages = {
        "nowhere.json": r"cannot be read \(No such file or directory\): `realign calibrate` makes one",
        "text.json": "holds no fp8 scales: `realign calibrate` makes them",
        "other.json": "the fp8 scales are of another checkpoint: `realign calibrate` makes this one's",
    }
    for name, message in messages.items():
        outcome = place.run(command, prompts, *settings, "--fp8", place.folder / name)
        assert outcome.code == 2
        if command == "calibrate":
            message = "scales are found without fp8: leave it out"
        assert re.fullmatch(rf"realign: error: --fp8 [^\n]*{message}\n", outcome.err), outcome.err
        assert not (place.folder / "new").exists()


def test_no_place_for_the_scales(place: Workplace) -> None:
    outcome = calibrate(place, "--out", "no/such/scales.json")
    assert outcome.code == 2
    assert "--out no/such/scales.json: give the name of a file in a folder that is there" in outcome.err


def test_what_has_no_scale_is_one_line(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "find_scale", lambda largest, find=fp8.find_scale: find(math.inf))
    outcome = calibrate(place)
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1] == (
        "realign: error: no scales: the largest number is inf: there is no scale for it"
    )
    assert not scales(place).exists()
