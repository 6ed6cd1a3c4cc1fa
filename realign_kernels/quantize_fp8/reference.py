"""Definition of `quantize_fp8` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_E4M3 = 448.0  # the largest number of float8_e4m3fn, which has no infinities


def quantize_fp8_reference(x: Tensor, scale: float) -> Tensor:
    """Scale in float32, hold to the range, round to nearest, ties to even."""
    inverse = torch.tensor(1 / scale, dtype=torch.float32, device=x.device)
    return (x.float() * inverse).clamp(-MAX_E4M3, MAX_E4M3).to(torch.float8_e4m3fn)
