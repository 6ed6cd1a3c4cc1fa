"""`python -m bench.gpu` with the host's clock: what it plans, writes and refuses."""

from __future__ import annotations

import pytest

from bench import gpu
from bench.green import Verdict
from bench.registry import OPS
from bench.rows import read_rows
from tests.bench.fakes import WallTimer, compile_nothing, measure_in_no_time

GREEN, RED = Verdict(True, 1.0, ""), Verdict(False, 1.0, "E  assert 1 == 2\n")


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """The command on this machine, every test green."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "NUM_COMPILERS", 1)
    monkeypatch.setattr(gpu, "CudaTimer", WallTimer)
    monkeypatch.setattr(gpu, "measure_case", measure_in_no_time)
    monkeypatch.setattr(gpu, "compile_case", compile_nothing)
    monkeypatch.setattr(gpu, "run_tests", lambda commands, deadline, at_once: dict.fromkeys(commands, GREEN))


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.jsonl")]) == 2
    assert capsys.readouterr().err == "bench.gpu: no CUDA device here (python -m bench times the CPU)\n"
    assert not list(tmp_path.iterdir())


def test_first_shapes_come_first():
    tasks = gpu.plan_tasks(list(OPS))
    assert len(tasks) == sum(len(op.gpu_shapes) for op in OPS.values())
    assert [task.op for task in tasks[: len(OPS)]] == list(OPS)
    assert [task.shape for task in tasks[: len(OPS)]] == [op.gpu_shapes[0] for op in OPS.values()]


def test_green_ops_are_measured(no_gpu_needed, tmp_path, capsys):
    out = tmp_path / "gpu.jsonl"
    assert gpu.main(["--op", "swiglu", "--op", "guided_flow_step", "--out", str(out), "--commit", "abc"]) == 0
    rows = read_rows(out)
    measured = {(row.op, row.shape, row.dtype) for row in rows}
    assert len(measured) == len(OPS["swiglu"].gpu_shapes) + len(OPS["guided_flow_step"].gpu_shapes)
    assert {row.commit for row in rows} == {"abc"}
    assert f"{len(rows)} rows appended to {out}" in capsys.readouterr().out


def test_an_op_with_a_red_test_has_no_row(no_gpu_needed, monkeypatch, tmp_path, capsys):
    def swiglu_is_red(commands, deadline, at_once):
        return {name: RED if name == "test_swiglu" else GREEN for name in commands}

    monkeypatch.setattr(gpu, "run_tests", swiglu_is_red)
    out = tmp_path / "gpu.jsonl"
    assert gpu.main(["--op", "swiglu", "--op", "guided_flow_step", "--out", str(out)]) == 1
    assert {row.op for row in read_rows(out)} == {"guided_flow_step"}
    printed = capsys.readouterr().out
    assert "RED" in printed
    assert "assert 1 == 2" in printed
    assert "assert 1 == 2" in (tmp_path / "gpu.tests.log").read_text()


def test_time_that_is_up_leaves_the_rest(no_gpu_needed, tmp_path, capsys):
    out = tmp_path / "gpu.jsonl"
    assert gpu.main(["--op", "swiglu", "--minutes", "0", "--out", str(out)]) == 0
    assert not out.exists()
    assert capsys.readouterr().out.count("no time was left") == len(OPS["swiglu"].gpu_shapes)
