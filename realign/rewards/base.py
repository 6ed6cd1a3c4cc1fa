"""What every reward takes and gives. N samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from realign.world.instructions import Instruction


class RewardError(RuntimeError):
    """A reward could not score a sample; the text is one line that names both, and says how to mend it."""


@dataclass(frozen=True, eq=False)
class Scored:
    """A picture to be scored, and what is known of it.

    Attributes:
        name: of the sample, for messages.
        picture: PIL, RGB; or a tensor on any device, uint8 [H, W, 3] or, as the autoencoder gives it, float
            [3, H, W] in [-1, 1].
        prompt: the texts of the prompt, in order.
        reasoning: the text that was written before the picture, None where nothing was.
        caption: what the reasoning says that the picture shows; None where the reasoning has no caption.
        is_malformed: the reasoning should have had a caption, and has none that can be read.
        references: the pictures of the prompt, in order.
        instruction: what the procedural world's oracle holds the picture to.
    """

    name: str
    picture: Image.Image | Tensor
    prompt: str = ""
    reasoning: str | None = None
    caption: str | None = None
    is_malformed: bool = False
    references: Sequence[Image.Image | Tensor] = field(default=())
    instruction: Instruction | None = None


class Reward(ABC):
    """Scores samples. `name` is the spec that builds it.

    A reward gives every sample a finite number or raises `RewardError`: a sample that cannot be scored is
    never given a number of some kind instead.
    """

    name: str

    @abstractmethod
    def score(self, samples: Sequence[Scored]) -> Tensor:
        """One number a sample, higher is better: float32 [N] on the CPU."""

    def score_parts(self, samples: Sequence[Scored]) -> Mapping[str, Tensor]:
        """What the score is made of, by name, each float32 [N]: of a sum its terms, unweighted."""
        return {self.name: self.score(samples)}

    def fail(self, sample: Scored, what: str) -> RewardError:
        """The error to raise for a sample; `what` says what is wrong, and how to mend it."""
        return RewardError(f"reward {self.name}: sample {sample.name!r}: {what}")

    def gather(self, values: Iterable[float] | Tensor, samples: Sequence[Scored]) -> Tensor:
        """Values as a float32 tensor on the CPU. Raises RewardError for a wrong number of them, or NaN."""
        if isinstance(values, Tensor):
            score_N = values.detach().to("cpu", torch.float32)
        else:
            score_N = torch.tensor(list(values), dtype=torch.float32)
        if score_N.shape != (len(samples),):
            raise RewardError(
                f"reward {self.name}: gave {tuple(score_N.shape)} for {len(samples)} samples: "
                "it must give one number each"
            )
        for index in (~score_N.isfinite()).nonzero().flatten().tolist():
            raise self.fail(samples[index], f"the score is {float(score_N[index])}; is the picture broken?")
        return score_N


class WeightedSum(Reward):
    """sum over terms of weight * score."""

    def __init__(self, terms: Sequence[tuple[Reward, float]]) -> None:
        names = [reward.name for reward, _ in terms]
        if not terms:
            raise ValueError("a sum of rewards has no terms: give at least one")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"reward {twice[0]} is named twice: give it once, with the sum of the weights")
        self.terms = tuple(terms)
        self.name = "+".join(
            name if w == 1 else f"{name}*{w:g}" for name, (_, w) in zip(names, terms, strict=True)
        )

    def score(self, samples: Sequence[Scored]) -> Tensor:
        """The sum."""
        return self.combine([reward.score(samples) for reward, _ in self.terms])

    def combine(self, scores: Sequence[Tensor]) -> Tensor:
        """The sum of the terms' scores, float32 [N] each, in their order."""
        weighted = [score_N * weight for score_N, (_, weight) in zip(scores, self.terms, strict=True)]
        return torch.stack(weighted).sum(0)

    def score_parts(self, samples: Sequence[Scored]) -> Mapping[str, Tensor]:
        return {reward.name: reward.score(samples) for reward, _ in self.terms}
