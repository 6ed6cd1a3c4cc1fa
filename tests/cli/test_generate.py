"""`realign generate` end to end on a tiny checkpoint: what it writes, and that it goes on where it was."""

import hashlib
import io
import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import realign
from realign.cli.generate import PreparedRun
from realign.cli.options import PICTURE_ARGUMENTS, PictureOptions
from realign.cli.pngs import load_metadata
from realign.runtime.options import GenerateOptions
from tests.cli.support import CHECKPOINT, Workplace, list_files, read_pictures, read_records

GENEVAL = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "counting",  "include": [{"class": "clock", "count": 2}], "prompt": "two é clocks"}',
]


def test_a_run_leaves_pictures_records_settings_and_a_gallery(place: Workplace, mixed: Path) -> None:
    outcome = place.generate(mixed, "--reasoning", "ic-cot", "--temperature", 1)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"4 pictures (4 new) in {place.out}; look at them in {place.out}/index.html\n"
    names = ["images/last.png", "images/plain.png", "images/two.png", "images/红星.png"]
    references = [f"refs/{hashlib.sha256((place.folder / n).read_bytes()).hexdigest()[:16]}.png"
                  for n in ("a.png", "bb.png")]  # fmt: skip
    files = [".realign/lock", *names, "index.html", "records.jsonl", *sorted(references), "run.json"]
    assert list_files(place.out) == files

    records = read_records(place.out)
    assert [record["id"] for record in records] == ["plain", "two", "红星", "last"]
    assert [record["seed"] for record in records] == [0, 0, 7, 0]
    two = records[1]
    assert two["prompt"] == [
        {"text": "put"},
        {"image": references[0], "source": "a.png", "height": 32, "width": 32},
        {"text": "on"},
        {"image": references[1], "source": "bb.png", "height": 22, "width": 48},
    ]
    assert two["reasoning"]["mode"] == "ic-cot"
    assert two["reasoning"]["text"]
    assert "IC-CoT" in two["reasoning"]["error"]  # random weights write no IC-CoT, and still draw

    run = json.loads((place.out / "run.json").read_text())
    assert run["settings"]["seed"] == 0
    assert run["settings"]["prompts_sha256"] == hashlib.sha256(mixed.read_bytes()).hexdigest()
    assert run["versions"]["torch"]
    for record in records:
        path = place.out / record["file"]
        assert load_metadata(path) == {"record": record, "settings": run["settings"]}
        with Image.open(path) as image:
            assert image.size == (record["width"], record["height"])


def test_sizes_follow_the_last_picture_the_model_or_the_command(place: Workplace, mixed: Path) -> None:
    place.generate(mixed)
    sizes = {record["id"]: (record["height"], record["width"]) for record in read_records(place.out)}
    assert sizes == {"plain": (16, 24), "last": (16, 24), "two": (24, 48), "红星": (32, 32)}
    for record in _rerun(place, mixed, "--height", 24, "--width", 16):
        assert (record["height"], record["width"]) == (24, 16)


def test_pictures_do_not_depend_on_the_batch_or_on_how_many(place: Workplace, mixed: Path) -> None:
    """Latents agree within 1e-5, so a picture may differ by one level of 255 where rounding is close."""
    place.generate(mixed, "--num-images", 2, "--batch-size", 3)
    several = read_pictures(place.out)
    assert len(several) == 8
    _rerun(place, mixed, "--batch-size", 1)
    for name, content in read_pictures(place.folder / "again").items():
        stem = name.removesuffix(".png")
        assert _difference(content, several[f"{stem}_0.png"]) <= 1
        assert _difference(content, several[f"{stem}_1.png"]) > 20


def test_the_same_command_again_makes_nothing(
    place: Workplace, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.generate(mixed, "--num-images", 11)
    before = {
        name: (place.out / name).stat().st_mtime_ns for name in list_files(place.out) if "html" not in name
    }
    assert "images/plain_00.png" in before
    monkeypatch.delattr(PreparedRun, "load_engine")
    outcome = place.generate(mixed, "--num-images", 11, "--batch-size", 5)
    assert outcome.code == 0
    assert outcome.out.startswith("44 pictures (0 new)")
    after = {name: (place.out / name).stat().st_mtime_ns for name in before}
    assert {name for name in before if before[name] != after[name]} == {".realign/lock"}


def test_other_settings_for_the_same_folder_are_refused(place: Workplace, mixed: Path) -> None:
    place.generate(mixed)
    before = {name: (place.out / name).read_bytes() for name in list_files(place.out)}
    cases = {
        ("--steps", 4): "steps was 3, is 4",
        ("--seed", 1, "--num-images", 2): "num_images was 1, is 2, seed was 0, is 1",
        ("--reasoning", "ic-cot"): 'reasoning was "none", is "ic-cot"',
        ("--height", 16, "--width", 16): "height was null, is 16, width was null, is 16",
        ("--guidance-interval", 0.1, 0.9): "guidance_interval was [0.4, 1.0], is [0.1, 0.9]",
        ("--cache-interval", 2): "cache_interval was 1, is 2",
        ("--dtype", "bfloat16"): 'dtype was "float32", is "bfloat16"',
        ("--model", CHECKPOINT, "--height", 16, "--width", 16): "model_fingerprint was",
    }
    for arguments, message in cases.items():
        if "--model" in map(str, arguments):
            place.write_prompts({"id": "a", "prompt": "b"}, name=mixed.name)
        outcome = place.generate(mixed, *arguments)
        assert outcome.code == 2
        assert re.fullmatch(r"realign: error: --out .*: holds another run: .*; repeat.*\n", outcome.err)
        assert message in outcome.err
    assert "prompts_sha256 was" in outcome.err
    assert before == {name: (place.out / name).read_bytes() for name in before}


def test_changed_references_are_another_run(place: Workplace, mixed: Path) -> None:
    place.generate(mixed)
    place.write_picture("a.png", (32, 40))
    outcome = place.generate(mixed)
    assert outcome.code == 2
    assert "references_sha256 was" in outcome.err


def test_geneval_gets_its_layout(place: Workplace) -> None:
    prompts = place.write_prompts(*GENEVAL)
    assert place.generate(prompts, "--format", "geneval", "--num-images", 2).code == 0
    pictures = [f"{n}/samples/{k}.png" for n in ("00000", "00001") for k in ("00000", "00001")]
    assert list(read_pictures(place.out)) == pictures
    check_geneval_layout(place.out, GENEVAL, 2)
    assert [record["file"] for record in read_records(place.out)] == pictures


def test_txt_and_python_make_the_same_pictures(place: Workplace) -> None:
    prompts = place.write_prompts("a red star", "", "two rings", name="prompts.txt")
    assert place.generate(prompts, "--seed", 3).code == 0
    samples = realign.load(place.model, device="cpu").generate(["a red star", "two rings"], steps=3, seed=3)
    for sample, content in zip(samples, read_pictures(place.out).values(), strict=True):
        assert _difference(_encode(sample.image, place.folder), content) <= 1


def test_every_option_of_python_has_its_flag() -> None:
    flags = {name for fields in PICTURE_ARGUMENTS.values() for name in fields}
    assert flags == set(PictureOptions.__dataclass_fields__)
    assert PictureOptions().of_request().keys() == GenerateOptions.__dataclass_fields__.keys()


def test_a_mode_without_training_is_a_warning(place: Workplace) -> None:
    prompts = place.write_prompts({"id": "a", "prompt": "a star"})
    outcome = place.generate(prompts, "--reasoning", "think")
    assert outcome.code == 0
    lines = [line for line in outcome.err.splitlines() if "warning" in line]
    assert len(lines) == 1
    assert re.search(r"realign: warning: .*was not trained for reasoning 'think'.*none, ic-cot", lines[0])
    assert read_records(place.out)[0]["reasoning"]["mode"] == "think"


def test_going_on_with_other_libraries_is_a_warning(place: Workplace, mixed: Path) -> None:
    place.generate(mixed)
    run = json.loads((place.out / "run.json").read_text())
    (place.out / "run.json").write_text(json.dumps({**run, "versions": {"torch": "1.0", "other": "2"}}))
    outcome = place.generate(mixed)
    assert outcome.code == 0
    assert re.fullmatch(r"realign: warning: .*\(torch 1.0 then, .* now\): pictures may differ\n", outcome.err)


def test_progress_is_plain_lines_off_a_terminal(place: Workplace, mixed: Path) -> None:
    lines = place.generate(mixed).err.splitlines()
    assert lines[0] == "realign: 4 pictures to make; as many as fit at a time, cpu, float32, attention sdpa"
    assert re.fullmatch(r"realign: 4/4 pictures, [\d.e+]+ images/s, \d+ s in all", lines[1])
    assert len(lines) == 2


def test_gallery_is_made_again(place: Workplace, mixed: Path) -> None:
    place.generate(mixed)
    page = (place.out / "index.html").read_text()
    (place.out / "index.html").unlink()
    outcome = place.run("gallery", place.out)
    assert (outcome.code, outcome.out) == (0, f"{place.out}/index.html\n")
    assert (place.out / "index.html").read_text() == page
    assert "a red &lt;b&gt;star&lt;/b&gt; &amp; &#34;more&#34;" in page
    for name in re.findall(r'(?:src|href)="([^"#]+)"', page):
        assert (place.out / unquote(name)).is_file(), name


def check_geneval_layout(folder: Path, lines: list[str], num_images: int) -> None:
    """The rules by which GenEval's scorer reads a folder (djghosh13/geneval, evaluate_images.py)."""
    numbered = sorted(path for path in folder.iterdir() if path.name.isdigit())
    assert [path.name for path in numbered] == [f"{index:05d}" for index in range(len(lines))]
    for path, line in zip(numbered, lines, strict=True):
        assert (path / "metadata.jsonl").read_text(encoding="utf-8") == line
        samples = sorted(entry.name for entry in (path / "samples").iterdir())
        assert samples == [f"{index:05d}.png" for index in range(num_images)]
        assert sorted(entry.name for entry in path.iterdir()) == ["metadata.jsonl", "samples"]


def _rerun(place: Workplace, prompts: Path, *arguments: object) -> list[dict]:
    again = place.folder / "again"
    assert place.generate(prompts, "--out", again, *arguments).code == 0
    return read_records(again)


def _difference(one: bytes, other: bytes) -> int:
    arrays = [np.asarray(Image.open(io.BytesIO(content)), dtype=int) for content in (one, other)]
    return abs(arrays[0] - arrays[1]).max()


def _encode(image: Image.Image, folder: Path) -> bytes:
    image.save(folder / "sample.png")
    return (folder / "sample.png").read_bytes()
