"""apply_rope against complex multiplication in float64."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import apply_rope
from tests.kernels.independence import assert_rows_are_independent


def tables(length, head_dim):
    half = torch.rand(length, head_dim // 2, dtype=torch.float64) * 100
    angle_LD = torch.cat((half, half), dim=-1)
    return angle_LD.cos(), angle_LD.sin()


def exact(x_LHD, cos_LD, sin_LD):
    first, second = x_LHD.double().chunk(2, dim=-1)
    half = cos_LD.shape[-1] // 2
    turn = torch.complex(cos_LD[:, None, :half].double(), sin_LD[:, None, :half].double())
    turned = torch.complex(first, second) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 2), (0, 3, 4), (5, 3, 6), (7, 2, 64)])
def test_rotates_as_a_complex_number(shape, dtype):
    x_LHD = torch.randn(shape).to(dtype)
    cos_LD, sin_LD = (table.float() for table in tables(shape[0], shape[2]))
    actual = apply_rope(x_LHD, cos_LD, sin_LD)
    assert actual.dtype == dtype
    # One rounding of the result, and the float32 products, which may cancel: in units of the largest part.
    atol = 4 * torch.finfo(torch.float32).eps * (x_LHD.abs().max().item() if x_LHD.numel() else 0)
    torch.testing.assert_close(
        actual.double(), exact(x_LHD, cos_LD, sin_LD), rtol=torch.finfo(dtype).eps, atol=atol
    )


def test_scores_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, 8, dtype=torch.float64)
    frequency = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64).repeat(2)

    def at(x, position):
        return apply_rope(x, (position * frequency).cos()[None], (position * frequency).sin()[None])

    torch.testing.assert_close(
        (at(query, 9.0) * at(key, 4.0)).sum(), (at(query, 105.0) * at(key, 100.0)).sum()
    )


def test_rows_are_independent():
    def op(x_LD, angle_LD):
        return apply_rope(x_LD[:, None], angle_LD, 1 - angle_LD)[:, 0]

    assert_rows_are_independent(op, 90, num_tensors=2)


def test_gradients():
    x_LHD = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    cos_LD, sin_LD = tables(3, 4)
    assert torch.autograd.gradcheck(lambda x_LHD: apply_rope(x_LHD, cos_LD, sin_LD), (x_LHD,))
