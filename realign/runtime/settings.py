"""What a user can set about one request; every value is checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from realign.model.config import RENORMS

ATTENTION_BACKENDS = ("varlen", "flash-attn", "xformers", "sdpa", "reference")


@dataclass(frozen=True)
class GuidanceSettings:
    """Classifier-free guidance. A scale of 1 or less switches its branch off.

    Image guidance acts only together with text guidance (`text_scale > 1`), as in BAGEL, and by default only
    for prompts that have pictures; `for_text_prompts` gives the others an image branch too (the texts without
    the reasoning), as BAGEL's inferencer does. `interval`: guidance is on for `lo < t <= hi`. `renorm_min`:
    the least factor that renorm may shrink a velocity by.
    """

    text_scale: float = 4.0
    image_scale: float = 2.0
    interval: tuple[float, float] = (0.4, 1.0)
    renorm: str = "global"
    renorm_min: float = 0.0
    for_text_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("text_scale", "image_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(
                    f"guidance {name} is {getattr(self, name)}: must be a number; 1 switches it off"
                )
        if len(self.interval) != 2 or not self.interval[0] <= self.interval[1]:
            raise ValueError(
                f"guidance interval is {self.interval}: must be two times, low then high, such as 0.4 1.0"
            )
        if self.renorm not in RENORMS:
            raise ValueError(f"guidance renorm is {self.renorm!r}: must be one of {', '.join(RENORMS)}")
        if not 0 <= self.renorm_min <= 1:
            raise ValueError(f"guidance renorm_min is {self.renorm_min}: must be from 0 to 1")


@dataclass(frozen=True)
class TextSettings:
    """How reasoning is written: `temperature` 0 is greedy, `top_p` keeps the likeliest tokens of that sum."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}: must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}: must be 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: must be above 0 and at most 1")


@dataclass(frozen=True)
class Settings:
    """Settings of one request; `height`, `width` in pixels, None for the model's own rule."""

    height: int | None = None
    width: int | None = None
    reasoning: str = "none"
    num_timesteps: int = 50
    timestep_shift: float = 3.0
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    text: TextSettings = field(default_factory=TextSettings)

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height is {self.height} and width is {self.width}: give both, or neither")
