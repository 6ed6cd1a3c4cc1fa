"""Which ops may be reported: those whose tests are green on this machine; files run beside each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNEL_TESTS = ROOT / "tests" / "kernels"
NO_TESTS = 5  # pytest's exit code


@dataclass(frozen=True)
class Verdict:
    """What came of a test file."""

    is_green: bool
    seconds: float
    output: str


def list_test_commands(ops: Sequence[str]) -> dict[str, list[str]]:
    """pytest's arguments by name: the files of the ops, other files of kernels, what else needs a GPU."""
    commands = {path.stem: [str(path)] for op in ops for path in find_tests(op)}
    commands |= {path.stem: [str(path)] for path in sorted(KERNEL_TESTS.glob("test_*.py"))}
    return commands | {"gpu": ["-m", "gpu", "--ignore", str(KERNEL_TESTS), str(ROOT / "tests")]}


def find_tests(op: str) -> list[Path]:
    """The test files of a bench entry: for `swiglu.backward` `test_swiglu.py` and any `test_swiglu_*.py`."""
    name = op.partition(".")[0]
    return [KERNEL_TESTS / f"test_{name}.py", *sorted(KERNEL_TESTS.glob(f"test_{name}_*.py"))]


def is_green(op: str, verdicts: dict[str, Verdict]) -> bool:
    """True if all tests of a bench entry are green."""
    return all(verdicts[path.stem].is_green for path in find_tests(op))


def run_tests(commands: dict[str, list[str]], deadline: float, at_once: int) -> dict[str, Verdict]:
    """Run each in a process of its own; what is not done at the deadline (of time.monotonic) is not green."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = {name: pool.submit(run_test, arguments, deadline) for name, arguments in commands.items()}
    return {name: future.result() for name, future in futures.items()}


def run_test(arguments: Sequence[str], deadline: float) -> Verdict:
    """Run pytest; green if it passes, or if there is nothing to run."""
    begin = time.monotonic()
    if begin >= deadline:
        return Verdict(False, 0.0, "not started in time\n")
    command = [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=deadline - begin)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = f"{process.communicate()[0]}\nnot done in time\n"
    return Verdict(process.returncode in (0, NO_TESTS), time.monotonic() - begin, output)
