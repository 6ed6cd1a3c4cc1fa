"""All bench entries by name: what the modules of `bench.ops` hold in `OPS`."""

from __future__ import annotations

import importlib
import pkgutil

from bench import ops
from bench.case import Op


def collect_ops() -> dict[str, Op]:
    """The entries of every module of `bench.ops`, modules in the order of their names."""
    collected: dict[str, Op] = {}
    for module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
        for name, op in importlib.import_module(module.name).OPS.items():
            assert name not in collected, f"two bench entries are called {name}"
            collected[name] = op
    return collected


OPS = collect_ops()
