"""What is kept of a sample's stochastic steps, so that training can take them again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoisyStep:
    """A stochastic step as it was sampled. L latent tokens, C channels; tensors are float32 on the CPU.

    Attributes:
        index: of the step in the schedule.
        sample_LC, next_LC: the latents before and after it.
        velocity_LC: the guided velocity that it was sampled with.
        logprob: of `next_LC`, a float32 number: GRPO's old log-prob.
    """

    index: int
    sample_LC: Tensor
    next_LC: Tensor
    velocity_LC: Tensor
    logprob: float


@dataclass(frozen=True, eq=False)
class Recording:
    """The stochastic steps of a picture.

    Attributes:
        noisy_steps: in their order.
        company: ids of the requests whose pictures were drawn in the same call, in the order of its rows;
            this one's is among them.
    """

    noisy_steps: tuple[NoisyStep, ...]
    company: tuple[str, ...]
