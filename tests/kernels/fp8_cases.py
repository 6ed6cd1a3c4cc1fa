"""What the tests of the fp8 ops share: their paths, and what a float8 may be off by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from realign_kernels.quantize_fp8.reference import MAX_E4M3
from tests.kernels.flow_cases import needs_triton

IMPLS = ["reference", pytest.param("triton", marks=needs_triton)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALLEST = 2.0**-9


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """The same float8 numbers, zeros' signs included; NaN is NaN."""
    assert actual.dtype == expected.dtype == torch.float8_e4m3fn
    actual, expected = actual.cpu(), expected.cpu()
    is_nan = expected.float().isnan()
    assert torch.equal(actual.float().isnan(), is_nan)
    assert torch.equal(actual.view(torch.uint8)[~is_nan], expected.view(torch.uint8)[~is_nan])


def assert_within_one_rounding(actual: Tensor, exact: Tensor, scale: float, dtype: torch.dtype) -> None:
    """Of `exact` float64 values: half a step of float8, and the roundings of `dtype` before it."""
    held = (exact / scale).clamp(-MAX_E4M3, MAX_E4M3)
    step = (held.abs() * 2.0**-3).clamp(min=SMALLEST)  # at most so far from one number to the next
    before = 4 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * held.abs()
    error = (actual.cpu().double() - held).abs()
    assert bool((error <= step / 2 + before + 1e-6).all()), (
        f"error {(error - step / 2).max():.3e} beyond half"
    )
