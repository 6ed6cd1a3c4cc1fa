"""swiglu against float64."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import swiglu
from tests.kernels.independence import assert_rows_are_independent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (5, 7), (3, 2, 65)])
def test_error_is_five_roundings(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    gate, up = (3 * torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    expected = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    # exp, the sum, its inverse and two products round once each (below float32 only the last two count).
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    torch.testing.assert_close(swiglu(gate, up).double(), expected, rtol=5 * eps, atol=tiny)


def test_rows_are_independent():
    assert_rows_are_independent(swiglu, 127, num_tensors=2)


def test_strides_do_not_matter():
    gate, up = torch.randn(2, 6, 5)
    assert torch.equal(swiglu(gate.T.contiguous().T, up), swiglu(gate, up))


def test_far_from_zero_values_and_gradients_are_finite():
    gate = torch.tensor([-1e4, -200.0, -90.0, 90.0, 1e4], requires_grad=True)
    value = swiglu(gate, torch.ones(5))
    value.sum().backward()
    torch.testing.assert_close(value, torch.tensor([0.0, 0, 0, 90, 1e4]), rtol=0, atol=1e-30)
    torch.testing.assert_close(gate.grad, torch.tensor([0.0, 0, 0, 1, 1]), rtol=0, atol=1e-30)


def test_gradients():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
