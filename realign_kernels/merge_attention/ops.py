"""Schema and results of the torch ops of `merge_attention`, whatever runs inside."""

from __future__ import annotations

import torch
from torch import Tensor

ARGUMENTS = "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b"
RESULTS = "(Tensor, Tensor)"


def allocate(out_a_LHD: Tensor) -> tuple[Tensor, Tensor]:
    """Merged values [L, H, D] and log-sum-exps [L, H], not computed."""
    num_tokens, num_heads, _ = out_a_LHD.shape
    return (
        torch.empty_like(out_a_LHD, memory_format=torch.contiguous_format),
        torch.empty((num_tokens, num_heads), dtype=torch.float32, device=out_a_LHD.device),
    )
