"""Signature, formula, checks and dispatch of `swiglu_fp8`. L rows, E numbers of a row."""

from __future__ import annotations

from torch import Tensor

from realign_kernels.checks import check_no_gradient, check_packed
from realign_kernels.dispatch import choose_impl
from realign_kernels.quantize_fp8.api import check_scale
from realign_kernels.quantize_fp8.reference import quantize_fp8_reference
from realign_kernels.swiglu.cpp import swiglu_cpp
from realign_kernels.swiglu_fp8.reference import swiglu_fp8_reference


def swiglu_fp8(gate_up_LE: Tensor, scale: float, impl: str = "auto") -> Tensor:
    """The gated activation as the next linear takes it: `quantize_fp8(swiglu(gate_up), scale)`.

    The gated activation is not written to memory; it is rounded to its dtype before it is quantised, so that
    the bits are those of the two ops.

    Args:
        gate_up_LE: [L, 2 E], gate in the first half, any float dtype; rows may have any stride.
        scale: a positive number: what the result is to be multiplied by.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` (plain torch quantises) or `"triton"`.

    Returns: float8_e4m3fn [L, E]. No gradient.
    Raises: ValueError naming the argument and its value.
    Source: `swiglu`, `quantize_fp8`.
    """
    check_packed("gate_up_LE", gate_up_LE)
    if gate_up_LE.shape[1] % 2:
        raise ValueError(f"gate_up_LE is {gate_up_LE.shape[1]} wide: must be even, gate and up")
    check_scale(scale)
    check_no_gradient("swiglu_fp8", gate_up_LE)
    path = choose_impl("swiglu_fp8", impl, (gate_up_LE,), {"cpp": False, "triton": False})
    if path == "reference":
        return swiglu_fp8_reference(gate_up_LE, scale)
    if path == "cpp":
        return quantize_fp8_reference(swiglu_cpp(gate_up_LE, None), scale)
    from realign_kernels.swiglu_fp8.triton import swiglu_fp8_triton

    return swiglu_fp8_triton(gate_up_LE, scale)
