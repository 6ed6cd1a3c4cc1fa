"""What the flow ops take beside packed tokens: numbers that may differ from sample to sample. B samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

RENORMS = ("none", "global", "channel", "text_channel")
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True, eq=False)
class Guidance:
    """How far each sample is pushed away from its unconditional velocities.

    Attributes:
        text_scale_B, image_scale_B: float32 [B]; 1 says "no guidance now". image_scale_B None is 1 for all.
        renorm: one of "none", "global", "channel", "text_channel" for all; or one per sample: a sequence of
            them, or an int32 [B] tensor of indexes into `RENORMS`, which costs no copy to a GPU.
        renorm_min_B: float32 [B] >= 0, least shrinking factor; None is 0 for all.
    """

    text_scale_B: Tensor
    image_scale_B: Tensor | None = None
    renorm: str | Sequence[str] | Tensor = "global"
    renorm_min_B: Tensor | None = None


@dataclass(frozen=True, eq=False)
class StepCoefficients:
    """The numbers of `x_next = a * x + b * v + std * noise`.

    Attributes:
        a_B, b_B: float32 [B].
        std_B: float32 [B] >= 0; None is 0 for all, an ODE step, which takes no noise.
    """

    a_B: Tensor
    b_B: Tensor
    std_B: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NoiseKeys:
    """Names the random numbers of each sample: a Philox4x32-10 key, and word 1 of its counter.

    Attributes:
        key_B: int64 [B], the key's two words, the low half being word 0.
        step_B: int64 [B], from 0 to 2**32 - 1.
    """

    key_B: Tensor
    step_B: Tensor


@dataclass(frozen=True, eq=False)
class LogProbCoefficients:
    """The numbers of `logprob = constant - weight * reduced((x_next - (a * x + b * v)) ** 2)`.

    A Gaussian step of deviation s has weight `1 / (2 s**2)` and constant `-ln s - ln(2 pi) / 2` (per number,
    for the mean); other schedules have their own. A step without noise has no log-prob: give it weight 0.

    Attributes:
        weight_B, constant_B: float32 [B].
        reduction: "mean" or "sum" over the numbers of a sample. A sample without tokens has the constant.
    """

    weight_B: Tensor
    constant_B: Tensor
    reduction: str = "mean"


@dataclass(frozen=True, eq=False)
class RatioBias:
    """The numbers of `bias = weight * reduced((b * (v - v_old)) ** 2)`, which GRPO-Guard adds to a log-ratio.

    Attributes:
        old_velocity_LC: the velocity that the step was sampled with; shape and dtype of the new one.
        weight_B: float32 [B] >= 0; `1 / (2 s**2)` for a step of deviation s.
    """

    old_velocity_LC: Tensor
    weight_B: Tensor
