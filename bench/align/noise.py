"""The stochastic steps of the reference trainers of BAGEL, in their own form; plain torch, one sample.

L latent tokens, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.generate.baseline import list_steps
from realign.runtime.noise import NoiseKey, normal
from realign.runtime.request import Request
from realign.runtime.settings import NoiseSettings, Settings


@dataclass(frozen=True)
class Transition:
    """A step's Gaussian: its mean [L, C], its deviation."""

    mean_LC: Tensor
    std: float
    is_whole: bool

    def logprob(self, next_LC: Tensor) -> Tensor:
        """Of the latents after the step: the mean over its numbers; CPS's is the squared error alone."""
        error_LC = (next_LC.detach() - self.mean_LC).square()
        if not self.is_whole:
            return -error_LC.mean()
        constant = math.log(self.std) + math.log(math.sqrt(2 * math.pi))
        return (-error_LC / (2 * self.std**2) - constant).mean()


def move(
    noise: NoiseSettings, times: list[float], number: int, sample_LC: Tensor, v_LC: Tensor
) -> Transition:
    """Step `number` of the schedule whose times are given, the last of them 0.

    Flow-GRPO's (`sd3_sde_with_logprob.py`) or CPS (arXiv 2509.05952), as Flow-GRPO and Flow-Factory have
    them.

    Raises: ValueError for another rule: no trainer of BAGEL's has it.
    """
    t, t_next = times[number : number + 2]
    if noise.rule == "cps":
        std = t_next * math.sin(noise.level * math.pi / 2)
        picture_LC, noise_LC = sample_LC - t * v_LC, sample_LC + (1 - t) * v_LC
        kept = math.sqrt(t_next**2 - std**2)
        return Transition(picture_LC * (1 - t_next) + noise_LC * kept, std, is_whole=False)
    if noise.rule != "flow-grpo":
        raise ValueError(f"window rule is {noise.rule!r}: the baseline has cps and flow-grpo")
    dt, rate = t_next - t, math.sqrt(t / (1 - (times[1] if t == 1 else t))) * noise.level
    mean_LC = sample_LC * (1 + rate**2 / (2 * t) * dt) + v_LC * (1 + rate**2 * (1 - t) / (2 * t)) * dt
    return Transition(mean_LC, rate * math.sqrt(-dt), is_whole=True)


def list_times(settings: Settings) -> list[float]:
    """Of every step, and 0."""
    return [time for time, _, _ in list_steps(settings)] + [0.0]


@dataclass(eq=False)
class Recorder:
    """Takes the steps of a request's picture: Euler's, in the window stochastic ones, which it keeps.

    Attributes:
        kept: of each stochastic step its number, the latents before and after it, and its log-prob.
    """

    request: Request
    kept: list[tuple[int, Tensor, Tensor, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.times = list_times(self.request.settings)
        self.bounds = self.request.settings.noise.bounds or (0, len(self.times) - 1)

    def __call__(self, number: int, sample_LC: Tensor, velocity_LC: Tensor) -> Tensor:
        if not self.bounds[0] <= number < self.bounds[1]:
            t, t_next = self.times[number : number + 2]
            return sample_LC + velocity_LC * (t_next - t)
        made = move(self.request.settings.noise, self.times, number, sample_LC, velocity_LC)
        key = NoiseKey(self.request.seed, self.request.id, stream="sde", step=number)
        drawn_LC = normal(key, sample_LC.shape).to(sample_LC.device)
        next_LC = made.mean_LC + made.std * drawn_LC
        self.kept.append((number, sample_LC, next_LC, float(made.logprob(next_LC))))
        return next_LC


def logprob_again(
    request: Request, number: int, sample_LC: Tensor, next_LC: Tensor, velocity_LC: Tensor
) -> Tensor:
    """The log-prob of a recorded step under another velocity, differentiable."""
    settings = request.settings
    made = move(settings.noise, list_times(settings), number, sample_LC, velocity_LC)
    return made.logprob(next_LC.to(torch.float32))
