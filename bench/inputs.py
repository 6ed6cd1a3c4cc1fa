"""Inputs that several ops share, and BAGEL's sizes. B samples, L tokens, C channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.case import Shape, randn
from realign_kernels import Guidance, LogProbCoefficients, NoiseKeys, StepCoefficients, philox_normal

TEXT_SCALE, IMAGE_SCALE, STEP = 4.0, 2.0, 0.02
SDE = {"a": 0.99, "b": -0.021, "std": 0.15}  # one of Flow-GRPO's steps, roughly

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
        sample_LC: float32, as the sampler keeps it; the velocities in the dtype of the shape.
        noise_LC: the normals of `keys`.
        euler, sde: the numbers of a step of the ODE, and of a noisy one, with its log-prob's.
        offsets: the offsets of the samples once more, as numbers on the host, for baselines that loop.
    """

    sample_LC: Tensor
    cond_LC: Tensor
    text_LC: Tensor
    image_LC: Tensor
    noise_LC: Tensor
    cu_seqlens: Tensor
    guidance: Guidance
    euler: StepCoefficients
    sde: StepCoefficients
    logprob: LogProbCoefficients
    keys: NoiseKeys
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
        number_B = torch.arange(batch, device=device)
        keys = NoiseKeys(number_B, number_B)
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
        return cls(
            randn(wide, device, "L", "C", seed=0),
            *(randn(packed, device, "L", "C", seed=seed) for seed in (1, 2, 3)),
            philox_normal(keys, cu_seqlens, batch * tokens, shape.sizes["C"]),
            cu_seqlens=cu_seqlens,
            guidance=Guidance(TEXT_SCALE * ones_B, IMAGE_SCALE * ones_B),
            euler=StepCoefficients(ones_B, -STEP * ones_B),
            sde=StepCoefficients(*(number * ones_B for number in SDE.values())),
            logprob=LogProbCoefficients(0.5 / SDE["std"] ** 2 * ones_B, 0.98 * ones_B),
            keys=keys,
            offsets=[tokens * sample for sample in range(batch + 1)],
        )
