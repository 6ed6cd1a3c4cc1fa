"""Memory over a long run: the rows, the mix, and the verdict."""

from __future__ import annotations

import json

import pytest

from bench.generate import soak


def test_rows_and_verdict(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(soak, "EVERY", 2)
    monkeypatch.setattr(soak, "NUM_TIMESTEPS", 2)
    out = tmp_path / "soak.jsonl"
    assert soak.main(["--requests", "9", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["samples"] for row in rows] == [2, 4, 6, 8]
    assert all(row["resident_mb"] > 10 for row in rows)
    assert capsys.readouterr().out.splitlines()[-1].endswith(": flat")
    held = iter([100.0, 100.0, 100.0, 133.0])
    monkeypatch.setattr(soak, "read_held_mb", lambda: next(held))
    assert soak.main(["--requests", "8", "--out", str(out)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "last half: +33.0 MB (at most 32): NOT FLAT"


def test_growth_is_of_the_last_half():
    assert soak.find_growth([0, 50, 100, 100, 90, 110, 103, 105]) == 4
    with pytest.raises(ValueError, match="3 rows: at least 4 are needed"):
        soak.find_growth([1, 2, 3])


def test_no_request_is_like_another():
    requests = [soak.build_request(number) for number in range(24)]
    assert {request.settings.reasoning for request in requests} == {"none", "ic-cot"}
    assert len({(request.settings.height, request.settings.width) for request in requests}) == 3
    assert max(len(request.prompt.pictures) for request in requests) >= 2
    pictures = [picture.tobytes() for request in requests for picture in request.prompt.pictures]
    assert len(set(pictures)) == len(pictures)
    assert len({request.prompt.parts[-1].text for request in requests}) > 20
