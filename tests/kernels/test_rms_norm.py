"""rms_norm against float64."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import rms_norm
from tests.kernels.independence import assert_rows_are_independent

SHAPES = [(1, 4), (0, 4), (5, 7), (3, 2, 65), (1, 1)]


def exact(x, weight, eps):
    x, weight = x.double(), weight.double()
    return weight * x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_three_roundings(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype).float()
    actual = rms_norm(x, weight, 1e-6)
    assert actual.dtype == dtype
    # The normed value and the product round once each; a third is room for the float32 arithmetic.
    torch.testing.assert_close(
        actual.double(), exact(x, weight, 1e-6), rtol=3 * torch.finfo(dtype).eps, atol=0
    )


def test_in_bfloat16_the_weight_acts_after_the_rounding():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    normed = rms_norm(x, torch.ones(8), 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), normed * weight.bfloat16())


@pytest.mark.parametrize("width", [1, 7, 128])
def test_rows_are_independent(width):
    weight = torch.randn(width, generator=torch.Generator().manual_seed(1))
    assert_rows_are_independent(lambda x: rms_norm(x, weight, 1e-6), width)


def test_strides_change_the_order_of_the_sum_only():
    x, weight = torch.randn(6, 10), torch.randn(10)
    actual = rms_norm(x.T.contiguous().T, weight, 1e-5)
    torch.testing.assert_close(actual, rms_norm(x, weight, 1e-5), rtol=1e-6, atol=0)


def test_gradients():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-6), (x, weight))
