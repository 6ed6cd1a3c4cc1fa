"""The quality rows: what is drawn, how it is judged, and a small run of the program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from bench.quality import WAYS, draw_world, judge_world, main
from realign.world.tasks import sample


def test_prompts_to_calibrate_on_are_others() -> None:
    requests, others = draw_world(8)
    texts = [{part.text for one in some for part in one.prompt.parts} for some in (requests, others)]
    assert len(requests) == 8
    assert texts[0] == {sample("t2i", index, split="test").text for index in range(8)}
    assert texts[0] != texts[1]


def test_the_oracle_judges_by_the_text() -> None:
    drawn = [sample("t2i", index, split="test") for index in range(6)]
    texts = [one.text for one in drawn]
    images = [Image.fromarray(one.render_target()) for one in drawn]
    assert judge_world(images, texts) == [1.0] * 6
    assert judge_world(images[::-1], texts[::-1]) == [1.0] * 6
    assert sum(judge_world(images[1:] + images[:1], texts)) < 3


@pytest.mark.parametrize("way", ["every 5th step", "fp8"])
def test_a_row(tmp_path: Path, way: str) -> None:
    assert way in WAYS
    assert main(["--num", "2", "--way", way, "--out", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["way"] == way
    assert (row["pictures"], row["timesteps"], len(row["velocity_error_by_step"])) == (2, 50, 49)
    assert 20 < row["psnr_worst"] <= row["psnr_mean"] < 100
    assert 0 < row["velocity_error_mean"] < 0.3
    assert all(0 <= share <= 1 for share in row["all_right"])
