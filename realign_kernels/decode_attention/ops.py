"""Schema and results of the torch ops of `decode_attention`, whatever runs inside."""

from __future__ import annotations

import torch
from torch import Tensor

ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor length"
RESULTS = "(Tensor, Tensor)"


def allocate(query_RHD: Tensor) -> tuple[Tensor, Tensor]:
    """Attended values [R, H, D] and log-sum-exps [R, H], not computed."""
    num_rows, num_heads, _ = query_RHD.shape  # torch takes long to read a shape that is a torch.Size
    return (
        torch.empty_like(query_RHD, memory_format=torch.contiguous_format),
        torch.empty((num_rows, num_heads), dtype=torch.float32, device=query_RHD.device),
    )


def in_place(heads: Tensor) -> Tensor:
    """The tensor where it lies, if the numbers of a head are next to each other."""
    return heads if heads.stride(-1) == 1 or heads.shape[-1] == 1 else heads.contiguous()
