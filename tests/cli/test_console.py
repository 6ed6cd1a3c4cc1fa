"""What a command says: help at once, one-line errors, progress with rate and time left."""

import re
import subprocess
import sys

import pytest

from realign.cli import console
from realign.cli.__main__ import COMMANDS, main
from realign.cli.console import BarProgress, LineProgress, RateMeter, format_duration
from tests.cli.support import ROOT


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["gallery", "--help"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from realign.cli.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"\n    {name}\s+{COMMANDS[name][:20]}", shown) for name in COMMANDS)


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "realign.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("realign ")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (190, "3 min 10 s"),
        (3600, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_the_rate_is_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    meter = RateMeter(total=110, done=100)
    assert meter.describe() == "0 images/s"
    now[0] += 4.0
    for _ in range(2):
        meter.advance()
    assert meter.describe() == "0.5 images/s, 16 s left"
    for _ in range(8):
        meter.advance()
    assert meter.describe() == "2.5 images/s, 4 s in all"


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with LineProgress(total=100, done=0, interval=10.0) as progress:
        for _ in range(100):
            now[0] += 0.3
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "realign: 34/100 pictures, 3.33 images/s, 20 s left",
        "realign: 68/100 pictures, 3.33 images/s, 10 s left",
        "realign: 100/100 pictures, 3.33 images/s, 30 s in all",
    ]


def test_the_bar_shows_count_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with BarProgress(total=4, done=1) as progress:
        progress.advance()
    shown = capsys.readouterr().err
    assert "2/4" in shown
    assert "images/s" in shown
    assert " left" in shown
