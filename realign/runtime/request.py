"""What comes in and what goes out: prompts, requests, samples, trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor

from realign.runtime.noise import NoiseKey
from realign.runtime.recording import Recording
from realign.runtime.settings import Settings


@dataclass(frozen=True)
class TextPart:
    """A text turn of a prompt."""

    text: str


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A reference picture, of any size and mode."""

    image: Image.Image


Part = TextPart | ImagePart


@dataclass(frozen=True, eq=False)
class Prompt:
    """An ordered list of text and image parts."""

    parts: tuple[Part, ...]

    @classmethod
    def build(cls, value: Prompt | str | Sequence[Any]) -> Prompt:
        """From text, or a list of: texts, pictures, `{"text": ..}`, `{"image": picture}`, parts.

        Raises: ValueError for anything else, or a prompt without text.
        """
        if isinstance(value, Prompt):
            return value
        if not isinstance(value, (str, Sequence)):
            raise ValueError(f"prompt is {_show(value)}: must be text or a list of texts and pictures")
        parts = tuple(_build_part(part) for part in ([value] if isinstance(value, str) else value))
        if not any(isinstance(part, TextPart) for part in parts):
            raise ValueError("the prompt has no text: add a text that says what to draw")
        return cls(parts)

    @property
    def pictures(self) -> list[Image.Image]:
        return [part.image for part in self.parts if isinstance(part, ImagePart)]


def _build_part(value: Any) -> Part:
    if isinstance(value, (TextPart, ImagePart)):
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        name, value = next(iter(value.items()))
        expected = {"text": str, "image": Image.Image}.get(name)
        if expected is None or not isinstance(value, expected):
            raise ValueError(
                f"prompt part {name!r} is {_show(value)}: must be {{'text': str}} or {{'image': PIL image}}"
            )
    if isinstance(value, str):
        return _build_text(value)
    if isinstance(value, Image.Image):
        return _build_image(value)
    raise ValueError(f"prompt part is {_show(value)}: must be text or a PIL image")


def _build_text(text: str) -> TextPart:
    if not text.strip():
        raise ValueError("a text of the prompt is empty: write what to draw")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text of the prompt is no Unicode ({error.reason}): mend it") from None
    return TextPart(text)


def _build_image(image: Image.Image) -> ImagePart:
    if 0 in image.size:
        raise ValueError(f"a picture of the prompt is {image.width}x{image.height}: it has no pixels")
    return ImagePart(image)


def _show(value: object) -> str:
    """A value for a message: on one line, shortened."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class TextTurn:
    """A text that the model wrote: token ids without bos and eos; `stopped` if it ended by itself (eos).

    `logprobs` are of the ids, and of the eos it stopped with, if they were recorded: under the distributions
    they were drawn from (temperature, top-p). They do not make it another text.
    """

    ids: tuple[int, ...]
    text: str
    stopped: bool
    logprobs: tuple[float, ...] = field(default=(), compare=False)


@dataclass(frozen=True, eq=False)
class Request:
    """One picture to make. Its noise depends on `seed` and `id` (and on nothing else).

    `turns` are texts that are taken as if the model had written them, where its program lets it write.
    """

    id: str
    prompt: Prompt
    seed: int = 0
    settings: Settings = field(default_factory=Settings)
    turns: tuple[TextTurn, ...] = ()


@dataclass(frozen=True)
class Reasoning:
    """What was thought before the picture.

    `text` is what the model wrote; `caption` and `relations` are its IC-CoT, where that is asked for; `error`
    says why it did not parse (the picture is made from the text all the same).
    """

    mode: str
    text: str
    caption: str | None = None
    relations: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a sample did.

    Attributes:
        text_turns: what the model wrote.
        noise_key: names the initial noise, `normal(noise_key, latent_LC.shape)`.
        latent_LC: final latents, float32 on the CPU, packed row by row.
        steps: the latents before the first step and after each, if they were asked for.
        recording: the stochastic steps, if they were asked for.
    """

    text_turns: tuple[TextTurn, ...]
    noise_key: NoiseKey
    latent_LC: Tensor
    steps: tuple[Tensor, ...] = ()
    recording: Recording | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """What came of a request.

    Attributes:
        picture: PIL, RGB; of an engine that records uint8 [H, W, 3], on the model's device.
        reasoning: None where none was asked for.
    """

    request: Request
    picture: Image.Image | Tensor
    reasoning: Reasoning | None
    trajectory: Trajectory

    @cached_property
    def image(self) -> Image.Image:
        """The picture as PIL: where it is on a device, copied to the host when it is first asked for."""
        return as_image(self.picture)


def as_image(picture: Image.Image | Tensor) -> Image.Image:
    """A `Sample.picture` as PIL; a tensor is copied to the host."""
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture.cpu().numpy())
