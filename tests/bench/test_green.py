"""Tests decide what may be reported."""

from __future__ import annotations

import time

from bench import green
from bench.green import find_test, list_test_commands, run_tests
from bench.registry import OPS


def test_every_entry_has_its_test_file_and_the_rest_runs_too():
    commands = list_test_commands(["swiglu"])
    assert commands["test_swiglu"] == [str(find_test("swiglu"))]
    assert {path.stem for path in green.KERNEL_TESTS.glob("test_*.py")} <= set(commands)
    assert "gpu" in commands
    assert find_test("swiglu.backward") == find_test("swiglu")
    for op in OPS:
        assert find_test(op).is_file(), f"{op} has no test"


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
