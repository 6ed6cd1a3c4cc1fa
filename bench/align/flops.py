"""Floating-point operations that an iteration needs: `bench.generate.flops` of its rollouts, and its replays.

A backward pass with the gradients of whole weights is twice a forward, one with LoRA's, whose own are not
counted, once; what is computed again is not needed, nor are the contexts read again. CLIP is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.generate.baseline import Made
from bench.generate.flops import Work
from realign.model.bagel import Bagel
from realign.runtime.request import Request

BACKWARD = {"full": 2, "lora": 1}


def count_iteration(
    model: Bagel, requests: Sequence[Request], made: Sequence[Made], policy: str
) -> dict[str, int]:
    """By phase; `policy` is a key of `BACKWARD`."""
    work, replay = Work(model), 0
    for request, one in zip(requests, made, strict=True):
        steps = work.add(request, one.turn, one.image.height, one.image.width)
        first, end = request.settings.noise.bounds or (0, len(steps))
        replay += sum(work.count_step(*step) for step in steps[first:end])
    return {**work.flops, "replay": (1 + BACKWARD[policy]) * replay}
