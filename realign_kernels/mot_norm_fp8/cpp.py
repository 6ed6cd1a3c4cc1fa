"""C++ path of `mot_norm_fp8`: the norm is C++, plain torch quantises. L packed tokens, E width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realign_kernels.mot_norm.cpp import mot_norm_cpp
from realign_kernels.quantize_fp8.reference import quantize_fp8_reference


def mot_norm_fp8_cpp(
    hidden_LE: Tensor,
    weights: Sequence[Tensor],
    num_und: int,
    scale: float,
    eps: float,
    residual_LE: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `mot_norm_fp8_reference`."""
    expert_L = torch.ones(len(hidden_LE), dtype=torch.int32)
    expert_L[:num_und] = 0
    normed_LE, total_LE, _ = mot_norm_cpp(hidden_LE, residual_LE, *weights, expert_L, eps)
    quantized_GE = quantize_fp8_reference(normed_LE[num_und:], scale)
    return normed_LE[:num_und], quantized_GE, hidden_LE if residual_LE is None else total_LE
