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


def swiglu(gate: Tensor, up: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Gated activation `gate * sigmoid(gate) * up`, elementwise.

    Args:
        gate, up: the same shape and dtype; rows may have any stride. Without `up` the rows of `gate` are
            both, gate in the first half, as a fused projection makes them; so is the gradient. The arithmetic
            is float32 (float64 for float64); the activation of `gate` is rounded to the dtype before it
            multiplies `up`, as plain torch rounds it.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: the same dtype, and shape (without `up`: half as wide). Differentiable in both.
    Raises: ValueError if shape, dtype or device differ, a width is odd, or `impl` cannot run.
    Source: Shazeer, arXiv 2002.05202, eq. 5.
    """
    check_dtype("gate", gate.dtype)
    if up is not None:
        check_like("up", up, "gate", gate)
    elif not gate.dim() or gate.shape[-1] % 2:
        raise ValueError(f"gate has shape {tuple(gate.shape)} and up is None: its width must be even")
    path = choose_impl("swiglu", impl, (gate, up), {"cpp": True, "triton": True})
    if path == "cpp":
        return swiglu_cpp(gate, up)
    if path == "triton":
        from realign_kernels.swiglu.triton import swiglu_triton

        return swiglu_triton(gate, up)
    return swiglu_reference(gate, up)
