"""The gate before the clock: a run whose numbers are wrong has no time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import OURS, PLAIN, Case, Run


def keep_right_runs(case: Case) -> tuple[dict[str, Run], list[str]]:
    """The runs that give the numbers of the plain one, and a line on each library that does not.

    Raises: ValueError if a run of ours is wrong: then nothing of the case is worth a row.
    """
    expected = _call(PLAIN, case.runs[PLAIN])
    faults = {
        name: fault
        for name, run in case.runs.items()
        if (fault := find_fault(expected, _call(name, run), case.relative_error, is_prefix=name not in OURS))
    }
    if ours := [f"{name} {fault}" for name, fault in faults.items() if name in OURS]:
        raise ValueError("; ".join(ours))
    right = {name: run for name, run in case.runs.items() if name not in faults}
    return right, [f"{name} left out: it {fault}" for name, fault in faults.items()]


def find_fault(
    expected: tuple[Tensor, ...], actual: tuple[Tensor, ...], allowed: float, is_prefix: bool = False
) -> str | None:
    """Say how results differ from those of plain torch by more than `allowed` (relative), or None."""
    if len(actual) > len(expected) or len(actual) < (1 if is_prefix else len(expected)):
        return f"gives {len(actual)} results, plain torch {len(expected)}"
    for wanted, got in zip(expected, actual, strict=False):
        if got.shape != wanted.shape:
            return f"gives shape {tuple(got.shape)}, plain torch {tuple(wanted.shape)}"
        error = measure_error(wanted, got)
        if not error <= allowed:
            return f"differs from plain torch by {error:.1e}, allowed are {allowed:.1e}"
    return None


def measure_error(expected: Tensor, actual: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; where zeros are expected, the norm of the actual."""
    wanted, got = expected.double(), actual.double()
    if torch.equal(wanted, got):
        return 0.0
    size = wanted.norm().item()
    error = (got - wanted).norm().item()
    return error / size if size > 0 or math.isnan(size) else error


def _call(name: str, run: Run) -> tuple[Tensor, ...]:
    with torch.no_grad(), _poisoned_memory() if name in OURS else contextlib.nullcontext():
        results = run()
    return (results,) if isinstance(results, Tensor) else tuple(results)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN: memory that the run before left behind cannot stand in for a result.

    For our own runs alone: a compiled baseline would be compiled anew, as it depends on this switch.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
