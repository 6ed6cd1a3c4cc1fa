"""The option `--golden DIR`, repeatable: folders with recorded outputs of the reference implementation."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from realign.evals.parity import Golden

DEFAULT = Path(__file__).parents[1] / "fixtures" / "bagel-tiny"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", action="append", metavar="DIR", help="golden folder (default: bagel-tiny); repeatable"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each group of cases of each folder."""
    if "golden_group" not in metafunc.fixturenames:
        return
    # When the whole test tree runs, this file is read too late to add its option.
    folders = metafunc.config.getoption("--golden", default=None) or [DEFAULT]
    try:
        groups = [(Path(folder), group) for folder in folders for group in load_golden(Path(folder)).groups()]
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    ids = [f"{folder.name}-{group}" for folder, group in groups]
    metafunc.parametrize("golden_group", groups, ids=ids)


@cache
def load_golden(folder: Path) -> Golden:
    return Golden(folder)


@pytest.fixture
def golden_results(golden_group):
    folder, group = golden_group
    return load_golden(folder).check(group)
