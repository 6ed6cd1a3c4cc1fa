"""A row has its own bits, in any company and on any number of threads; so has a sum over rows, the latter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.kernels.devices import device_of

NUM_ROWS = {"reference": 1543, "cpp": 1543, "triton": 131}  # odd; enough for threads, few for the interpreter
# Of the rows, and of the sums.
Run = Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]]


def draw_rows(impl: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers of these shapes for each row."""
    generator = torch.Generator().manual_seed(0)
    device = device_of(impl)
    return [torch.randn(NUM_ROWS[impl], *shape, generator=generator).to(device) for shape in shapes]


def assert_rows_are_independent(impl: str, run: Run, tensors: Sequence[Tensor]) -> None:
    """Compare all rows at once, on 1 to 3 threads, with slices of a few rows."""
    num_rows = len(tensors[0])
    torch.set_num_threads(1)
    rows, sums = run(*tensors)
    for start in range(0, num_rows - 3, num_rows // 11):
        part = slice(start, start + 1 + start % 3)
        alone, _ = run(*(tensor[part].clone() for tensor in tensors))
        assert_equal(alone, [row[part] for row in rows])
    for num_threads in (2, 3) if impl != "triton" else ():
        torch.set_num_threads(num_threads)
        try:
            results = run(*tensors)
        finally:
            torch.set_num_threads(1)
        assert_equal(results[0], rows)
        assert_equal(results[1], sums)
    assert_equal(run(*tensors)[1], sums)


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """The same bits."""
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
