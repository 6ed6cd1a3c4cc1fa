"""Signature and checks of `swiglu`."""

from __future__ import annotations

from torch import Tensor

from realign_kernels.swiglu.reference import swiglu_reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gated activation `gate * sigmoid(gate) * up`, elementwise.

    Args:
        gate, up: the same shape and dtype.

    Returns: the same shape and dtype. Differentiable in both.
    Raises: ValueError if the shapes differ.
    Source: Shazeer, arXiv 2002.05202, eq. 5.
    """
    if gate.shape != up.shape:
        raise ValueError(
            f"swiglu: gate has shape {tuple(gate.shape)}, up {tuple(up.shape)}: they must be equal"
        )
    return swiglu_reference(gate, up)
