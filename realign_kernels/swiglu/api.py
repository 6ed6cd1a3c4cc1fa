"""Signature, formula, checks and dispatch of `swiglu`.

Liger-Kernel has it too, for GPUs; ours also runs on CPUs, where mini is trained and everything is tested
(Liger's kernels fail in Triton's interpreter), and rounds the activation where plain torch does.
"""

from __future__ import annotations

from torch import Tensor

from realign_kernels.checks import check_dtype, check_like
from realign_kernels.dispatch import choose_impl
from realign_kernels.swiglu.cpp import swiglu_cpp
from realign_kernels.swiglu.reference import swiglu_reference


def swiglu(gate: Tensor, up: Tensor, impl: str = "auto") -> Tensor:
    """Gated activation `gate * sigmoid(gate) * up`, elementwise.

    Args:
        gate, up: the same shape and dtype. The arithmetic is float32 (float64 for float64); the activation of
            `gate` is rounded to the dtype before it multiplies `up`, as plain torch rounds it.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: the same shape and dtype. Differentiable in both.
    Raises: ValueError if shape, dtype or device differ, or `impl` cannot run.
    Source: Shazeer, arXiv 2002.05202, eq. 5.
    """
    check_dtype("gate", gate.dtype)
    check_like("up", up, "gate", gate)
    path = choose_impl("swiglu", impl, (gate, up), {"cpp": True, "triton": True})
    if path == "cpp":
        return swiglu_cpp(gate, up)
    if path == "triton":
        from realign_kernels.swiglu.triton import swiglu_triton

        return swiglu_triton(gate, up)
    return swiglu_reference(gate, up)
