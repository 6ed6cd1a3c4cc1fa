"""A row's bits are its own: not its neighbours', not the number of threads'."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NUM_ROWS = 1543  # odd, and large enough for torch to share the work between threads


def assert_rows_are_independent(op: Callable[..., Tensor], width: int, num_tensors: int = 1) -> None:
    """Compare all rows at once, on 1 to 3 threads, with slices of a few rows."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(NUM_ROWS, width, generator=generator) for _ in range(num_tensors)]
    torch.set_num_threads(1)
    expected = op(*tensors)
    for start in range(0, NUM_ROWS - 3, 97):
        rows = slice(start, start + 1 + start % 3)
        assert torch.equal(op(*(tensor[rows].clone() for tensor in tensors)), expected[rows])
    for num_threads in (2, 3):
        torch.set_num_threads(num_threads)
        actual = op(*tensors)
        torch.set_num_threads(1)
        assert torch.equal(actual, expected)
