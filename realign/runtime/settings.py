"""What a user can set about one request; every value is checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from realign.model.config import RENORMS

# Rotary positions kept for a token that is written, its bos and its eos, and the picture.
KEPT_POSITIONS = 4
ATTENTION_BACKENDS = ("varlen", "flash-attn", "xformers", "sdpa", "reference")
SDE_RULES = ("flow-grpo", "dance-grpo", "cps")
MAX_ORDER = 8  # of a forecast; on mini order 6 gains a decibel over order 1


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
class CachingSettings:
    """Steps whose velocities are forecast from earlier ones (see `realign.runtime.forecast`): off by default.

    Attributes:
        interval: after the `first` steps every so many-th is computed, and the last; 1: all are.
        order: of the forecast; 0 repeats the last velocity, 1 goes on in a straight line.
        reuse_guidance_below: where t is at most this, the unconditional branches do not run: their last
            difference from the conditional velocity is taken again. 0: they always run.
    """

    interval: int = 1
    order: int = 1
    first: int = 5
    reuse_guidance_below: float = 0.0

    def __post_init__(self) -> None:
        for name, least, most in (("interval", 1, math.inf), ("order", 0, MAX_ORDER), ("first", 1, math.inf)):
            value = getattr(self, name)
            if not least <= value <= most:
                upper = "" if most == math.inf else f" and at most {most}"
                raise ValueError(f"caching {name} is {value}: must be at least {least}{upper}")
        if not 0 <= self.reuse_guidance_below <= 1:
            what = f"caching reuse_guidance_below is {self.reuse_guidance_below}"
            raise ValueError(f"{what}: must be a time from 0 to 1")

    @property
    def is_on(self) -> bool:
        return self.interval > 1 or self.reuse_guidance_below > 0


@dataclass(frozen=True)
class NoiseSettings:
    """Steps that add noise, as GRPO's rollouts do (see `Schedule.with_noise`): off by default.

    Attributes:
        rule: one of `SDE_RULES`.
        level: how much noise; 0: none.
        window: (start, size): the steps that add it, counted from 0; None: all.
    """

    rule: str = "flow-grpo"
    level: float = 0.0
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_noise(self.rule, self.level)
        if self.window is None:
            return
        if len(self.window) != 2 or self.window[0] < 0 or self.window[1] < 1:
            raise ValueError(f"noise window is {self.window}: must be (start, size), such as (0, 3)")
        object.__setattr__(self, "window", tuple(self.window))
        if self.window is not None:
            object.__setattr__(self, "window", tuple(self.window))  # settings are keys of caches

    @property
    def is_on(self) -> bool:
        return self.level > 0

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The first noisy step, and the first after them."""
        return None if self.window is None else (self.window[0], sum(self.window))


def check_noise(rule: str, level: float) -> None:
    """Raise ValueError for a noise rule that there is not, or a level that it cannot have."""
    if rule not in SDE_RULES:
        raise ValueError(f"noise rule is {rule!r}: must be one of {', '.join(SDE_RULES)}")
    most = 1.0 if rule == "cps" else math.inf
    if not (math.isfinite(level) and 0 <= level <= most):
        raise ValueError(
            f"noise level is {level}: must be a number from 0{' to 1' if rule == 'cps' else ' up'}"
        )


def check_times(num_timesteps: int, shift: float) -> None:
    """Raise ValueError for fewer than two timesteps or a shift that is not a positive number."""
    if num_timesteps < 2:
        raise ValueError(f"num_timesteps is {num_timesteps}: must be at least 2, for one step")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"timestep shift is {shift}: must be a positive number; 1 leaves the times even")


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
    caching: CachingSettings = field(default_factory=CachingSettings)
    noise: NoiseSettings = field(default_factory=NoiseSettings)

    def __post_init__(self) -> None:
        check_times(self.num_timesteps, self.timestep_shift)
        num_steps = self.num_timesteps - 1
        if self.noise.window is not None and sum(self.noise.window) > num_steps:
            what = f"noise window is {self.noise.window}"
            raise ValueError(
                f"{what}: must end within the {num_steps} steps of {self.num_timesteps} timesteps"
            )
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height is {self.height} and width is {self.width}: give both, or neither")
