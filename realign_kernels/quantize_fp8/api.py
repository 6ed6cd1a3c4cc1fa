"""Signature, formula, checks and dispatch of `quantize_fp8`."""

from __future__ import annotations

import math

from torch import Tensor

from realign_kernels.checks import check_dtype, check_no_gradient
from realign_kernels.dispatch import choose_impl
from realign_kernels.quantize_fp8.reference import quantize_fp8_reference


def quantize_fp8(x: Tensor, scale: float, impl: str = "auto") -> Tensor:
    """Numbers as float8_e4m3fn times a static scale: `round(clamp(x / scale, -448, 448))`.

    `x / scale` is `x * (1 / scale)` in float32, whatever the dtype: exact if the scale is a power of two.
    Rounded to nearest, ties to even; what lies outside the range is held to it; NaN stays NaN.

    Args:
        x: any shape, any float dtype.
        scale: a positive number: what the result is to be multiplied by.
        impl: `"auto"` (table in `dispatch.py`), `"reference"` or `"triton"`.

    Returns: float8_e4m3fn, shape of `x`. No gradient.
    Raises: ValueError naming the argument and its value.
    Source: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433, table 1.
    """
    check_dtype("x", x.dtype)
    check_scale(scale)
    check_no_gradient("quantize_fp8", x)
    if choose_impl("quantize_fp8", impl, (x,), {"triton": False}) == "reference":
        return quantize_fp8_reference(x, scale)
    from realign_kernels.quantize_fp8.triton import quantize_fp8_triton

    return quantize_fp8_triton(x, scale)


def check_scale(scale: float) -> None:
    """Raise ValueError unless `scale` is a positive number."""
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}: must be a positive number")
