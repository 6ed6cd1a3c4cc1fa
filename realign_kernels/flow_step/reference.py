"""Definition of `flow_step` in plain torch. L packed tokens, C channels, B samples."""

from __future__ import annotations

import torch
from torch import Tensor


def flow_step_reference(
    sample_LC: Tensor,
    velocity_LC: Tensor,
    cu_seqlens: Tensor,
    a_B: Tensor,
    b_B: Tensor,
    std_B: Tensor | None = None,
    noise_LC: Tensor | None = None,
) -> Tensor:
    """`(a * x + b * v) + std * noise`, in float32 (float64 stays float64), in the dtype of `sample_LC`."""
    wide = torch.promote_types(torch.promote_types(sample_LC.dtype, velocity_LC.dtype), torch.float32)
    lengths_B = cu_seqlens.diff()

    def per_token(number_B: Tensor) -> Tensor:
        return number_B.to(wide).repeat_interleave(lengths_B, output_size=sample_LC.shape[0]).unsqueeze(1)

    next_LC = per_token(a_B) * sample_LC.to(wide) + per_token(b_B) * velocity_LC.to(wide)
    if std_B is not None and noise_LC is not None:
        next_LC = next_LC + per_token(std_B) * noise_LC.to(wide)
    return next_LC.to(sample_LC.dtype)
