"""Options of `pytest bench/test_cpu.py`; `python -m bench` sets them."""

from __future__ import annotations

import pytest
import torch

from bench.registry import OPS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--bench-op", action="append", choices=list(OPS), help="this op only; may be repeated")
    group.addoption("--bench-quick", action="store_true", help="the first shape of each op only")
    group.addoption("--bench-seconds", type=float, default=0.15, help="time for each run of a case")
    group.addoption("--bench-threads", type=int, help="torch threads")


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--bench-threads"):
        torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per op and shape."""
    option = metafunc.config.getoption
    names = option("--bench-op") or list(OPS)
    pairs = [
        pytest.param(name, shape, id=f"{name} {shape} {str(shape.dtype).removeprefix('torch.')}")
        for name in names
        for shape in OPS[name].shapes[: 1 if option("--bench-quick") else None]
    ]
    metafunc.parametrize(("op", "shape"), pairs)


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """Time for each run of a case."""
    return request.config.getoption("--bench-seconds")
