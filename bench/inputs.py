"""Inputs that several ops share, and BAGEL's sizes. B samples, L tokens, C channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.case import Shape, randn

TEXT_SCALE, IMAGE_SCALE, STEP = 4.0, 2.0, 0.02

# 1024 and 4096 tokens are pictures of 512 and 1024 pixels on BAGEL, whose latents have 64 channels.
LATENTS = [
    Shape({"B": batch, "L": tokens, "C": 64}, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for tokens in (1024, 4096)
    for batch in (1, 4, 16)
]
GPU_LATENTS = [
    Shape({"B": batch, "L": tokens, "C": 64}, torch.bfloat16)
    for batch, tokens in ((96, 4096), (1, 4096), (16, 1024), (32, 4096), (1, 1024), (8, 4096), (96, 1024))
] + [Shape({"B": 96, "L": 4096, "C": 64}, torch.float32)]


@dataclass(frozen=True)
class Flow:
    """Packed fields of equally long samples, and the numbers of a guided Euler step.

    Attributes:
        sample_LC: float32, as the sampler keeps it; the three velocities in the dtype of the shape.
        offsets: the offsets of the samples once more, as numbers on the host, for baselines that loop.
    """

    sample_LC: Tensor
    cond_LC: Tensor
    text_LC: Tensor
    image_LC: Tensor
    noise_LC: Tensor
    cu_seqlens: Tensor
    text_scale_B: Tensor
    image_scale_B: Tensor
    a_B: Tensor
    b_B: Tensor
    offsets: list[int]

    @property
    def branches(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three velocities."""
        return self.cond_LC, self.text_LC, self.image_LC

    @classmethod
    def build(cls, shape: Shape, device: torch.device) -> Flow:
        """Random fields on `device`; every sample has the same numbers, as the baselines can do no other."""
        batch, tokens = shape.sizes["B"], shape.sizes["L"]
        packed = Shape({"L": batch * tokens, "C": shape.sizes["C"]}, shape.dtype)
        wide = Shape(packed.sizes, torch.float32)
        ones_B = torch.ones(batch, device=device)
        return cls(
            randn(wide, device, "L", "C", seed=0),
            *(randn(packed, device, "L", "C", seed=seed) for seed in (1, 2, 3)),
            randn(wide, device, "L", "C", seed=4),
            cu_seqlens=torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens,
            text_scale_B=TEXT_SCALE * ones_B,
            image_scale_B=IMAGE_SCALE * ones_B,
            a_B=ones_B,
            b_B=-STEP * ones_B,
            offsets=[tokens * sample for sample in range(batch + 1)],
        )
