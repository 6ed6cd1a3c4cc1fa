"""`format`: whether the reasoning is a well-formed IC-CoT with one relation for each reference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from realign.reasoning.schemas import parse_iccot
from realign.rewards.base import Reward, Scored


class FormatReward(Reward):
    """1 where `parse_iccot` reads the reasoning and its relations are as many as the references, else 0.

    A sample without reasoning is an error: there is nothing to hold to a format.
    """

    name = "format"

    def score(self, samples: Sequence[Scored]) -> Tensor:
        """0 or 1 a sample."""
        return self.gather([self._score(sample) for sample in samples], samples)

    def _score(self, sample: Scored) -> float:
        if sample.reasoning is None:
            raise self.fail(sample, "it has no reasoning; make pictures with --reasoning ic-cot")
        try:
            parse_iccot(sample.reasoning, len(sample.references))
        except ValueError:
            return 0.0
        return 1.0
