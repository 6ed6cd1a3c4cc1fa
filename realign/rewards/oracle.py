"""`oracle`: what the procedural world's oracle reads in a picture, against what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from realign.rewards.base import Reward, Scored
from realign.rewards.pictures import to_array
from realign.world.instructions import Instruction
from realign.world.language import read_caption
from realign.world.oracle import Verdict, judge, read_pictures
from realign.world.render import SIZE

MODES = ("parts", "strict")


class OracleReward(Reward):
    """Holds a picture to its instruction; where a sample has none, to its own caption, or else its prompt.

    Args:
        mode: "parts": the mean of four, the share of objects that are there as wanted, and whether their
            number, their relations, and the background (in an edit also: what had to stay) are right.
            "strict": 1 where everything is right, else 0.
    """

    def __init__(self, mode: str = "parts") -> None:
        if mode not in MODES:
            raise ValueError(f"oracle mode is {mode!r}: must be one of {', '.join(MODES)}")
        self.mode = mode
        self.name = "oracle" if mode == "parts" else f"oracle:{mode}"

    def score(self, samples: Sequence[Scored]) -> Tensor:
        """0 to 1 a sample."""
        pictures = [self._to_array(sample) for sample in samples]
        readings = read_pictures(pictures)
        verdicts = [judge(r, self._find_instruction(s)) for r, s in zip(readings, samples, strict=True)]
        return self.gather([self._value(verdict) for verdict in verdicts], samples)

    def _value(self, verdict: Verdict) -> float:
        if self.mode == "strict":
            return float(verdict.all_right)
        parts = verdict.parts
        if verdict.preserved is not None:
            parts = (*parts, float(verdict.preserved))
        return sum(parts) / len(parts)

    def _find_instruction(self, sample: Scored) -> Instruction:
        if sample.instruction is not None:
            return sample.instruction
        text = sample.prompt if sample.caption is None else sample.caption
        try:
            return Instruction.exactly(read_caption(text))
        except ValueError as error:
            raise self.fail(
                sample, f"has no instruction, and its text is no caption of the world: {error}"
            ) from error

    def _to_array(self, sample: Scored) -> np.ndarray:
        array = to_array(sample.picture)
        if array.shape != (SIZE, SIZE, 3):
            height, width = array.shape[:2]
            raise self.fail(sample, f"is {width}x{height}; the oracle reads pictures of {SIZE}x{SIZE}")
        return array
