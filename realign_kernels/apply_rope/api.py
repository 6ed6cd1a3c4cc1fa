"""Signature and checks of `apply_rope`. L packed tokens, H heads, D head dim."""

from __future__ import annotations

from torch import Tensor

from realign_kernels.apply_rope.reference import apply_rope_reference


def apply_rope(x_LHD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Rotary embedding, halves paired: `x * cos + (-x2, x1) * sin` with `x = (x1, x2)`.

    Args:
        x_LHD: queries or keys, any float dtype; the arithmetic is float32 (float64 for float64).
        cos_LD, sin_LD: per token, both halves of D filled with the same angles; float32 is recommended.

    Returns: [L, H, D] in the dtype of `x_LHD`. Differentiable.
    Raises: ValueError if D is odd or the tables do not fit.
    Source: Su et al., arXiv 2104.09864, in the half-split layout of Qwen2.
    """
    length, _, head_dim = x_LHD.shape
    if head_dim % 2:
        raise ValueError(f"apply_rope: head dim is {head_dim}, must be even")
    for name, table in (("cos_LD", cos_LD), ("sin_LD", sin_LD)):
        if table.shape != (length, head_dim):
            raise ValueError(
                f"apply_rope: {name} has shape {tuple(table.shape)}, must be {(length, head_dim)}"
            )
    return apply_rope_reference(x_LHD, cos_LD, sin_LD)
