"""Definition of `mot_norm_fp8` in plain torch. L packed tokens, U of them understanding's, E width."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from realign_kernels.mot_norm.reference import norm_rows
from realign_kernels.quantize_fp8.reference import quantize_fp8_reference


def mot_norm_fp8_reference(
    hidden_LE: Tensor,
    weights: Sequence[Tensor],
    num_und: int,
    scale: float,
    eps: float,
    residual_LE: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add; normalise each expert's tokens by its weight; quantise generation's."""
    total_LE = hidden_LE if residual_LE is None else hidden_LE + residual_LE
    und, gen = weights
    normed_UE = norm_rows(total_LE[:num_und], [und], eps, None, total_LE.dtype)
    normed_GE = norm_rows(total_LE[num_und:], [gen], eps, None, total_LE.dtype)
    return normed_UE, quantize_fp8_reference(normed_GE, scale), total_LE
