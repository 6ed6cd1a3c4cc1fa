"""Floating-point operations that an iteration needs: `bench.generate.flops` of its rollouts, and its replays.

A backward pass is twice a forward; with LoRA, whose own products are not counted, a product with frozen
weights has one gradient and counts once. What is computed again is not needed, nor are the contexts read
again. CLIP is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.generate.baseline import Made
from bench.generate.flops import Work, count_products
from realign.model.bagel import Bagel
from realign.runtime.request import Request


def count_iteration(
    model: Bagel, requests: Sequence[Request], made: Sequence[Made], policy: str
) -> dict[str, int]:
    """By phase; `policy` is "full" or "lora"."""
    work, replay = Work(model), 0
    for request, one in zip(requests, made, strict=True):
        steps = work.add(request, one.turn, one.image.height, one.image.width)
        first, end = request.settings.noise.bounds or (0, len(steps))
        for num_tokens, lengths in steps[first:end]:
            replay += 3 * work.count_step(num_tokens, lengths)
            if policy == "lora":
                replay -= len(lengths) * count_products(model.config.llm, num_tokens)
    return {**work.flops, "replay": replay}
