"""`realign demo`: prompts drawn from the world, then the main job on them."""

from pathlib import Path

import pytest

from realign.cli.demo import TASKS, write_prompts
from realign.data.readers import load_references, read_prompts
from tests.cli.support import Workplace, list_files, read_records


def demo(place: Workplace, *arguments: object):
    return place.run("demo", "--out", place.out, "--model", place.model, "--device", "cpu", "--steps", 3,
                     "--num-prompts", 6, "--max-reasoning-tokens", 8, *arguments)  # fmt: skip


def test_the_prompts_are_good_and_the_same_each_time(tmp_path: Path) -> None:
    prompts = read_prompts(write_prompts(tmp_path / "one", 24))
    references = load_references(prompts)
    assert len(prompts.entries) == 24
    assert {len(entry.pictures) for entry in prompts.entries} >= {0, 1, 2, 3}
    assert all(entry.texts for entry in prompts.entries)
    write_prompts(tmp_path / "two", 24)
    for name in list_files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(references) == len(list((tmp_path / "one" / "prompts").glob("*.png")))


def test_the_demo_runs_and_goes_on(place: Workplace) -> None:
    outcome = demo(place)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"6 pictures (6 new) in {place.out}; look at them in {place.out}/index.html\n"
    records = read_records(place.out)
    assert [record["id"].partition("-")[2] for record in records] == list(TASKS)
    assert all(record["reasoning"]["mode"] == "ic-cot" for record in records)
    assert demo(place).out.startswith("6 pictures (0 new)")


def test_the_demo_refuses_what_is_not_its_own(place: Workplace) -> None:
    place.out.mkdir()
    (place.out / "thesis.txt").write_text("mine")
    outcome = demo(place)
    assert outcome.code == 2
    assert "has files that realign did not make" in outcome.err
    assert list_files(place.out) == ["thesis.txt"]


def test_the_demo_on_mini(place: Workplace) -> None:
    outcome = place.run("demo", "--out", place.out, "--num-prompts", 4, "--steps", 6, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert "warning" not in outcome.err
    records = read_records(place.out)
    assert [(record["height"], record["width"]) for record in records] == [(64, 64)] * 4
    assert all(record["reasoning"]["error"] is None for record in records)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--num-prompts", 0),
        ("--steps", 1),
        ("--out", "/proc/nothing"),
        ("--model", "nowhere"),
        ("--device", "tpu"),
        ("--height", 17, "--width", 16),
    ],
)
def test_bad_settings_are_refused(place: Workplace, arguments: tuple) -> None:
    outcome = demo(place, *arguments)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert not place.out.exists()


def test_another_number_of_prompts_is_another_demo(place: Workplace) -> None:
    demo(place)
    outcome = demo(place, "--num-prompts", 7)
    assert outcome.code == 2
    assert "holds other prompts than these" in outcome.err
