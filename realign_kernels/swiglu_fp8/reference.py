"""Definition of `swiglu_fp8` in plain torch."""

from __future__ import annotations

from torch import Tensor

from realign_kernels.quantize_fp8.reference import quantize_fp8_reference
from realign_kernels.swiglu.reference import swiglu_reference


def swiglu_fp8_reference(gate_up_LE: Tensor, scale: float) -> Tensor:
    """`swiglu`, rounded to its dtype, then `quantize_fp8`."""
    return quantize_fp8_reference(swiglu_reference(gate_up_LE, None), scale)
