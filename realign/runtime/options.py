"""The options of a picture by the names that users give, for the command line and Python alike. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

from realign.model.config import REASONING_MODES
from realign.runtime.settings import CachingSettings, GuidanceSettings, Settings, TextSettings


@dataclass(frozen=True)
class GenerateOptions:
    """What decides a picture beside prompt and seed, by the names of the command line and of Python.

    `height`, `width` in pixels, None for the model's own rule; `steps` are timesteps (N - 1 denoising steps);
    `temperature` 0 is greedy; `cache_*` and `reuse_guidance_below` are `CachingSettings`.
    The defaults are the settings' own.
    """

    reasoning: str = Settings.reasoning
    height: int | None = None
    width: int | None = None
    steps: int = Settings.num_timesteps
    timestep_shift: float = Settings.timestep_shift
    text_guidance_scale: float = GuidanceSettings.text_scale
    image_guidance_scale: float = GuidanceSettings.image_scale
    guidance_interval: tuple[float, float] = GuidanceSettings.interval
    guidance_renorm: str = GuidanceSettings.renorm
    guidance_renorm_min: float = GuidanceSettings.renorm_min
    temperature: float = TextSettings.temperature
    top_p: float = TextSettings.top_p
    max_reasoning_tokens: int = TextSettings.max_tokens
    cache_interval: int = CachingSettings.interval
    cache_order: int = CachingSettings.order
    cache_first: int = CachingSettings.first
    reuse_guidance_below: float = CachingSettings.reuse_guidance_below

    def settings(self) -> Settings:
        """As the runtime takes them. Raises: ValueError for a value that cannot be used."""
        self._check_kinds()
        if self.reasoning not in REASONING_MODES:
            raise ValueError(f"reasoning is {self.reasoning!r}: must be one of {', '.join(REASONING_MODES)}")
        guidance = GuidanceSettings(
            self.text_guidance_scale,
            self.image_guidance_scale,
            tuple(self.guidance_interval),
            self.guidance_renorm,
            self.guidance_renorm_min,
        )
        text = TextSettings(self.max_reasoning_tokens, self.temperature, self.top_p)
        caching = CachingSettings(
            self.cache_interval, self.cache_order, self.cache_first, self.reuse_guidance_below
        )
        size = (self.height, self.width)
        return Settings(*size, self.reasoning, self.steps, self.timestep_shift, guidance, text, caching)

    def _check_kinds(self) -> None:
        """Every value is of its default's kind: text, a whole number, a number, or numbers."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            kind, what = _KINDS[type(field.default)]
            numbers = value if kind is Sequence and isinstance(value, Sequence) else ()
            is_kind = isinstance(value, kind) and not isinstance(
                value, bool
            )  # which Python counts as a number
            if not is_kind or not all(isinstance(number, Real) for number in numbers):
                raise ValueError(f"{field.name} is {value!r}: must be {what}")


# By the type of an option's default; those without one are sizes.
_KINDS = {
    str: (str, "text"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    tuple: (Sequence, "two numbers"),
    type(None): (Integral, "a whole number"),
}
