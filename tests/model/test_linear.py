"""Linear layers by rows: the same numbers as torch's, and bits that do not depend on the company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from realign.model.linear import RowLinear, linear_by_rows


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 5, 6, 7, 9, 11, 18, 63, 64, 65])
def test_a_row_has_its_own_bits(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((500, 96), (40, 96), (40,)))
    among_many, few = linear_by_rows(x, weight, bias), linear_by_rows(x[:num_rows], weight, bias)
    assert torch.equal(few, among_many[:num_rows])
    torch.testing.assert_close(few, F.linear(x[:num_rows], weight, bias))


def test_gradients_are_those_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    ours, theirs = RowLinear(8, 5).double(), torch.nn.Linear(8, 5).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 8, dtype=torch.float64)
    for layer in (ours, theirs):
        (layer(x) ** 2).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
