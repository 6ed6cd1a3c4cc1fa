"""Tests decide what may be reported."""

from __future__ import annotations

import time

from bench import green
from bench.green import Verdict, find_tests, is_green, list_test_commands, run_tests
from bench.registry import OPS


def test_every_entry_has_its_test_file_and_the_rest_runs_too():
    commands = list_test_commands(["swiglu"])
    assert commands["test_swiglu"] == [str(green.KERNEL_TESTS / "test_swiglu.py")]
    assert {path.stem for path in green.KERNEL_TESTS.glob("test_*.py")} <= set(commands)
    assert "gpu" in commands
    assert find_tests("swiglu.backward") == find_tests("swiglu")
    for op in OPS:
        assert find_tests(op)[0].is_file(), f"{op} has no test"


def test_an_op_is_green_if_all_its_files_are():
    files = [path.stem for path in find_tests("guided_flow_step")]
    assert files == ["test_guided_flow_step", "test_guided_flow_step_cuda"]
    verdicts = {name: Verdict(True, 1.0, "") for name in files}
    assert is_green("guided_flow_step.sde", verdicts)
    assert not is_green("guided_flow_step.sde", verdicts | {files[1]: Verdict(False, 1.0, "")})


def test_green_red_empty_and_missing(tmp_path):
    tests = {
        "green": "def test_it(): assert True",
        "red": "def test_it(): assert 1 == 2",
        "broken": "import no_such_module",
        "empty": "",
    }
    for name, text in tests.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    commands = {name: [str(tmp_path / f"test_{name}.py")] for name in tests}
    commands["gone"] = [str(tmp_path / "test_gone.py")]
    verdicts = run_tests(commands, time.monotonic() + 120, at_once=5)
    assert {name for name, verdict in verdicts.items() if verdict.is_green} == {"green", "empty"}
    assert "assert 1 == 2" in verdicts["red"].output


def test_what_is_late_is_not_green(tmp_path):
    (tmp_path / "test_late.py").write_text("import time\ndef test_it(): time.sleep(600)")
    commands = {"late": [str(tmp_path / "test_late.py")]}
    late = run_tests(commands, time.monotonic() + 4, at_once=1)["late"]
    assert not late.is_green
    assert late.output.endswith("not done in time\n")
    assert run_tests(commands, time.monotonic(), at_once=1)["late"].output == "not started in time\n"
