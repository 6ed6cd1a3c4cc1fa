"""Whatever is wrong is said in one line, with exit code 2, before anything is written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.support import CHECKPOINT, Outcome, Workplace, list_files

FINE = {"id": "a", "prompt": "a star"}


def check_refused(outcome: Outcome, message: str) -> None:
    assert outcome.code == 2
    assert outcome.out == ""
    assert re.fullmatch(r"realign: error: [^\n]+; [^\n]+\n|realign: error: [^\n]+: [^\n]+\n", outcome.err), (
        outcome.err
    )
    assert re.search(message, outcome.err), outcome.err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "a", "prompt": ', r"prompts\.jsonl:2: broken JSON at column"),
        ({"id": "first", "prompt": "x"}, r"prompts\.jsonl:2: the id 'first' is on line 1 already"),
        ({"id": "FIRST", "prompt": "x"}, r"prompts\.jsonl:2: .*one file name on some systems"),
        ({"id": "../a", "prompt": "x"}, r"prompts\.jsonl:2: .*cannot be a file name"),
        ({"id": "a", "prompt": "x", "size": 5}, r"prompts\.jsonl:2: unknown field 'size'"),
        ({"id": "a", "prompt": [{"image": "no.png"}, {"text": "x"}]}, r"prompts\.jsonl:2: .*no\.png"),
        ({"id": "a", "prompt": [{"image": "broken.png"}, {"text": "x"}]}, r"prompts\.jsonl:2: .*is damaged"),
        ({"id": "a", "prompt": [{"image": "bomb.png"}, {"text": "x"}]}, r"prompts\.jsonl:2: .*40 million"),
        (
            {"id": "a", "prompt": "x " * 40_000},
            r"prompts\.jsonl:2: the prompt has \d+ tokens, .*at most 32764",
        ),
    ],
)
def test_bad_prompts(place: Workplace, row: object, message: str) -> None:
    content = place.write_picture("broken.png").read_bytes()
    (place.folder / "broken.png").write_bytes(content[: len(content) // 2])
    Image.new("1", (8000, 8000)).save(place.folder / "bomb.png")
    check_refused(place.generate(place.write_prompts({"id": "first", "prompt": "x"}, row)), message)
    assert not place.out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--height", 20, "--width", 16), "--height 20: give a multiple of 8 from 8 to 128"),
        (("--height", 16, "--width", 136), "--width 136: give a multiple of 8"),
        (("--height", 0, "--width", 16), "--height 0"),
        (("--height", -8, "--width", 16), "--height -8"),
        (("--height", 16), "--height and --width go together"),
        (("--height", "x", "--width", 16), "argument --height: invalid int value"),
        (("--num-images", 0), "--num-images 0: give a number that is at least 1"),
        (("--steps", 1), "--steps 1: give a number that is at least 2"),
        (("--steps", 1.5), "argument --steps: invalid int value"),
        (("--batch-size", 0), "--batch-size 0"),
        (("--seed", -1), "--seed -1"),
        (("--seed", 2**63), "--seed 9223372036854775808"),
        (("--text-guidance-scale", "nan"), "--text-guidance-scale nan"),
        (("--image-guidance-scale", "inf"), "--image-guidance-scale inf"),
        (("--guidance-interval", 0.5, 0.5), "--guidance-interval 0.5 0.5: .*LOW < HIGH"),
        (("--guidance-interval", 0.6, 0.4), "--guidance-interval 0.6 0.4"),
        (("--guidance-interval", -0.1, 1), "--guidance-interval -0.1 1"),
        (("--guidance-interval", "nan", 1), "--guidance-interval nan 1"),
        (("--guidance-interval", 0.5), "expected 2 arguments"),
        (("--guidance-renorm", "local"), "invalid choice: 'local'"),
        (("--cache-interval", 0), "--cache-interval 0: give a number that is at least 1"),
        (("--cache-interval", 2.5), "argument --cache-interval: invalid int value"),
        (("--cache-order", 9), "--cache-order 9: give a number that is at least 0 and at most 8"),
        (("--cache-first", 0), "--cache-first 0"),
        (("--reuse-guidance-below", 1.1), "--reuse-guidance-below 1.1: .* at least 0 and at most 1"),
        (("--reuse-guidance-below", "nan"), "--reuse-guidance-below nan"),
        (("--timestep-shift", 0), "--timestep-shift 0.0: give a number above 0"),
        (("--temperature", -1), "--temperature -1.0"),
        (("--top-p", 0), "--top-p 0.0"),
        (("--top-p", 1.1), "--top-p 1.1"),
        (("--max-reasoning-tokens", 0), "--max-reasoning-tokens 0"),
        (("--reasoning", "cot"), "invalid choice: 'cot'"),
        (("--format", "csv"), "invalid choice: 'csv'"),
        (("--format", "geneval"), r"prompts\.jsonl:1: unknown field 'id'"),
        (("--device", "tpu"), "--device tpu: give auto, cpu, cuda"),
        (("--device", "cuda:99"), r"--device cuda:99: torch finds \d+ CUDA devices"),
        (("--dtype", "float64"), "invalid choice: 'float64'"),
        (("--attention", "fast"), "invalid choice: 'fast'"),
        (("--attention", "varlen", "--device", "cpu"), "it runs on CUDA devices alone: take auto"),
        (("--model", "nowhere"), "--model nowhere: nowhere is not a folder"),
        (("--model", CHECKPOINT), "own size 1024x1024 does not fit it: give --height and --width"),
        (("--unknown", 5), "unrecognized arguments"),
        (("--heigh", 16), "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_bad_settings(place: Workplace, arguments: tuple, message: str) -> None:
    check_refused(place.generate(place.write_prompts(FINE), *arguments), message)
    assert not place.out.exists()


def test_bad_commands(place: Workplace) -> None:
    check_refused(place.run(), "the following arguments are required: COMMAND")
    check_refused(place.run("paint"), "invalid choice: 'paint'")
    check_refused(place.run("generate"), "the following arguments are required: PROMPTS, --out")
    check_refused(place.run("gallery", place.folder), "has no run.json")
    check_refused(place.generate(place.folder / "no.jsonl"), r"no\.jsonl:1: cannot be read")
    check_refused(
        place.generate(place.write_prompts(name="empty.txt")), r"empty\.txt:1: the file has no prompts"
    )


def test_a_reference_that_the_model_cannot_take(place: Workplace) -> None:
    place.write_picture("a.png")
    prompts = place.write_prompts({"id": "a", "prompt": [{"image": "a.png"}, {"text": "x"}]})
    outcome = place.generate(prompts, "--model", CHECKPOINT, "--height", 16, "--width", 16)
    check_refused(
        outcome, r":1: the model resizes 'a.png' to 512x512, and takes at most 128; mend vae_resize"
    )


def _cut_weights(model: Path) -> None:
    content = (model / "ema.safetensors").read_bytes()
    (model / "ema.safetensors").write_bytes(content[: len(content) // 2])


def _break_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def _only_pickles(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    torch.save({}, model / "pytorch_model.bin")


def _lose_tokenizer(model: Path) -> None:
    (model / "vocab.json").unlink()


def _lose_autoencoder(model: Path) -> None:
    (model / "ae.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_weights, r"ema\.safetensors"),
        (_break_config, r"config\.json"),
        (_only_pickles, "pickled"),
        (_lose_tokenizer, "tokenizer"),
        (_lose_autoencoder, r"ae\.safetensors"),
    ],
)
def test_a_damaged_model_leaves_no_folder(place: Workplace, damage: object, message: str) -> None:
    model = place.folder / "model"
    shutil.copytree(place.model, model)
    damage(model)
    check_refused(place.generate(place.write_prompts(FINE), "--model", model), message)
    assert not place.out.exists()


def test_folders_that_are_not_ours(place: Workplace) -> None:
    prompts = place.write_prompts(FINE)
    place.out.mkdir()
    (place.out / "thesis.txt").write_text("mine")
    check_refused(place.generate(prompts), r"has files that realign did not make \('thesis.txt'\)")
    for content in ('{"name": "other tool"}', '{"made_by": "realign"}', "[]", "5"):
        (place.out / "run.json").write_text(content)
        check_refused(place.generate(prompts), r"its run\.json is not realign's")
        check_refused(place.run("gallery", place.out), r"its run\.json is not realign's")
    (place.out / "run.json").write_text("[")
    check_refused(place.generate(prompts), r"has no run\.json that can be read")
    assert list_files(place.out) == ["run.json", "thesis.txt"]
    check_refused(place.generate(prompts, "--out", prompts), r"--out .*prompts\.jsonl: is a file")
    check_refused(place.generate(prompts, "--out", prompts / "sub"), "is a file; name a folder elsewhere")
    check_refused(
        place.generate(prompts, "--out", "/proc/nothing/here"), "/proc/nothing/here: cannot be made"
    )
    check_refused(place.generate(prompts, "--out", place.folder / ("x" * 300)), "x: cannot be made")


def test_a_folder_that_cannot_be_written(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check_refused(place.generate(place.write_prompts(FINE)), f"{place.folder} cannot be written to; choose")


def test_an_empty_folder_is_taken(place: Workplace) -> None:
    place.out.mkdir()
    assert place.generate(place.write_prompts(FINE)).code == 0


def test_two_at_once_are_refused(place: Workplace) -> None:
    prompts = place.write_prompts(FINE)
    assert place.generate(prompts).code == 0
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, 2); print('held', flush=1); input()"
    )
    command = [sys.executable, "-c", hold, str(place.out / ".realign" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        check_refused(place.generate(prompts), r"another realign process \(pid \d+\) is writing here; wait")
        holder.communicate("\n")
    assert place.generate(prompts).code == 0


def test_names_with_line_ends_stay_on_one_line(place: Workplace) -> None:
    check_refused(place.generate(place.folder / "a\nb.jsonl"), "a b.jsonl:1: cannot be read")
    row = {"id": "a", "prompt": [{"image": "x\ny\u2028z.png"}, {"text": "x"}]}
    check_refused(place.generate(place.write_prompts(json.dumps(row))), r"prompts\.jsonl:1: picture")


def test_more_text_than_there_are_positions(place: Workplace) -> None:
    """The system text of a reasoning mode counts: what fits without it may not fit with it."""
    prompts = place.write_prompts({"id": "long", "prompt": "star " * 32755})
    arguments = ("generate", prompts, "--out", place.out, "--reasoning", "ic-cot")
    outcome = place.run(*arguments)
    assert outcome.code == 2
    assert re.search(
        r"prompts.jsonl:1: the prompt has \d+ tokens, the model reads at most 32764; shorten it", outcome.err
    )
    assert not place.out.exists()
