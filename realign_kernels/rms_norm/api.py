"""Signature and checks of `rms_norm`."""

from __future__ import annotations

from torch import Tensor

from realign_kernels.rms_norm.reference import rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Root-mean-square norm over the last dimension: `weight * x / sqrt(mean(x^2) + eps)`.

    Args:
        x: [..., E], any float dtype; the arithmetic is float32 (float64 for float64).
        weight: [E]; cast to `x.dtype` after normalising, as Qwen2 does.
        eps: added to the mean square.

    Returns: [..., E] in `x.dtype`. Differentiable in both tensors.
    Raises: ValueError if `weight` does not fit the last dimension of `x`.
    Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}, x ends in {x.shape[-1]}: "
            "pass one weight per channel"
        )
    return rms_norm_reference(x, weight, eps)
