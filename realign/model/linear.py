"""Linear layers whose rows do not depend on how many there are.

On a CPU the BLAS (MKL, with one thread and with two) computes the rows beyond a multiple of four by another
routine while there are few, and their last bits differ: a token would then depend on its company. Small
products are padded to that multiple; a row's bits are then its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLE, FEW_ROWS = 4, 64


def linear_by_rows(
    x_LE: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`F.linear` of [L, E] rows, each with the bits that it has among any others."""
    num_rows = x_LE.shape[0]
    if num_rows >= FEW_ROWS or not num_rows % MULTIPLE or x_LE.device.type != "cpu":
        return F.linear(x_LE, weight, bias)
    padded_LE = F.pad(x_LE, (0, 0, 0, -num_rows % MULTIPLE))
    return F.linear(padded_LE, weight, bias)[:num_rows]


class RowLinear(nn.Linear):
    """`nn.Linear` over [L, E] rows by `linear_by_rows`."""

    def forward(self, x_LE: torch.Tensor) -> torch.Tensor:
        return linear_by_rows(x_LE, self.weight, self.bias)


class FusedLinear(RowLinear):
    """Several projections of the same rows as one product, their outputs side by side.

    Args:
        sizes: name and number of outputs of each, in the order of the weight's rows.
    """

    def __init__(self, in_features: int, sizes: Mapping[str, int], bias: bool = True) -> None:
        super().__init__(in_features, sum(sizes.values()), bias)
        self.sizes = dict(sizes)

    def rows(self) -> dict[str, slice]:
        """The rows of weight and bias that are each projection's."""
        rows, end = {}, 0
        for name, size in self.sizes.items():
            rows[name] = slice(end, end + size)
            end += size
        return rows
