"""What is made: the workloads, at the sizes of each model.

W1, W2 are text to image, large and small; W3 a group of one prompt with four references, as GRPO draws it;
W3t the same without references; W4 reasoning chains for one prompt with three references, then their
pictures. BAGEL-7B's prompts are random pictures and characters; mini's are its world's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from realign.model.config import BagelConfig
from realign.runtime.request import Prompt, Request
from realign.runtime.settings import GuidanceSettings, Settings, TextSettings
from realign.world.tasks import sample

GROUP, CHAINS, CHAIN_TOKENS, RL_TIMESTEPS = 24, 32, 256, 15
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROMPT_LENGTH = 40  # characters, and so tokens, of a random prompt
UNGUIDED = GuidanceSettings(1.0, 1.0)
WORLD_SAMPLES = {0: ("t2i", 1), 3: ("in_context", 1), 4: ("in_context", 11)}  # by the number of references


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests that are made as one batch.

    Attributes:
        variant: what tells it from others of the same name.
        has_baseline: whether the baseline makes them too; a form of ours alone is compared with our own.
    """

    name: str
    variant: str
    requests: tuple[Request, ...]
    has_baseline: bool = True


@dataclass(frozen=True)
class Sizes:
    """Sides of the squares in pixels: pictures of W1, of all others, and references."""

    large: int
    small: int
    reference: int


def build_workloads(
    config: BagelConfig, name: str, max_samples: int | None = None, sizes: Sizes | None = None
) -> list[Workload]:
    """The variants of a workload; `max_samples` bounds groups, and leaves out larger batches."""
    is_mini = config.name == "mini"
    sizes = sizes or (Sizes(64, 64, 32) if is_mini else Sizes(1024, 512, 512))
    workloads = BUILDERS[name](sizes, _draw_world_prompt if is_mini else _draw_random_prompt)
    if max_samples is None:
        return list(workloads)
    return [
        replace(workload, requests=workload.requests[:max_samples])
        for workload in workloads
        if name not in BATCHED or len(workload.requests) <= max_samples
    ]


DrawPrompt = Callable[[int, int], Prompt]  # of the number of references and their side


def _build_w1(sizes: Sizes, draw_prompt: DrawPrompt) -> Iterator[Workload]:
    settings = Settings(sizes.large, sizes.large)
    for count in (1, 4):
        yield _repeat("W1", f"batch {count}", draw_prompt(0, sizes.reference), settings, count)


def _build_w2(sizes: Sizes, draw_prompt: DrawPrompt) -> Iterator[Workload]:
    settings = Settings(sizes.small, sizes.small)
    for count in BATCHES:
        yield _repeat("W2", f"batch {count}", draw_prompt(0, sizes.reference), settings, count)


def _build_w3(sizes: Sizes, draw_prompt: DrawPrompt) -> Iterator[Workload]:
    settings = Settings(sizes.small, sizes.small, num_timesteps=RL_TIMESTEPS)
    unguided, prompt = replace(settings, guidance=UNGUIDED), draw_prompt(4, sizes.reference)
    yield _repeat("W3", "unguided", prompt, unguided, GROUP)
    yield _repeat("W3", "guided", prompt, settings, GROUP)
    alone = _repeat("W3", "unguided, nothing shared", prompt, unguided, GROUP)
    apart = tuple(_mark_pictures(request, number) for number, request in enumerate(alone.requests))
    yield replace(alone, requests=apart, has_baseline=False)


def _build_w3t(sizes: Sizes, draw_prompt: DrawPrompt) -> Iterator[Workload]:
    settings = Settings(sizes.small, sizes.small, num_timesteps=RL_TIMESTEPS)
    prompt, always = draw_prompt(0, sizes.reference), GuidanceSettings(4.0, 1.0, (0.0, 1.0))
    yield _repeat("W3t", "unguided", prompt, replace(settings, guidance=UNGUIDED), GROUP)
    yield _repeat("W3t", "guided on every step", prompt, replace(settings, guidance=always), GROUP)


def _build_w4(sizes: Sizes, draw_prompt: DrawPrompt) -> Iterator[Workload]:
    text = TextSettings(CHAIN_TOKENS, temperature=1.0)
    settings = Settings(sizes.small, sizes.small, "ic-cot", RL_TIMESTEPS, text=text)
    prompt = draw_prompt(3, sizes.reference)
    yield _repeat("W4", "unguided", prompt, replace(settings, guidance=UNGUIDED), CHAINS)
    yield _repeat("W4", "guided", prompt, settings, CHAINS)


BUILDERS: dict[str, Callable[[Sizes, DrawPrompt], Iterator[Workload]]] = {
    "W1": _build_w1,
    "W2": _build_w2,
    "W3": _build_w3,
    "W3t": _build_w3t,
    "W4": _build_w4,
}
BATCHED = ("W1", "W2")  # their variants are sizes of a batch


def _repeat(name: str, variant: str, prompt: Prompt, settings: Settings, count: int) -> Workload:
    requests = [Request(f"{name}/{number}", prompt, settings=settings) for number in range(count)]
    return Workload(name, variant, tuple(requests))


def _draw_world_prompt(num_references: int, side: int) -> Prompt:
    """One of the world's test prompts; its references have the world's own size."""
    task, index = WORLD_SAMPLES[num_references]
    drawn = sample(task, index, split="test")
    return Prompt.build([*(Image.fromarray(reference.picture) for reference in drawn.references), drawn.text])


def _draw_random_prompt(num_references: int, side: int) -> Prompt:
    rng = np.random.default_rng(num_references)
    pictures = [_draw_picture(rng, side) for _ in range(num_references)]
    letters = rng.integers(ord("a"), ord("z") + 1, PROMPT_LENGTH)
    return Prompt.build([*pictures, "".join(map(chr, letters))])


def _draw_picture(rng: np.random.Generator, side: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def _mark_pictures(request: Request, number: int) -> Request:
    """The request with a pixel of its pictures changed: no other has them, so nothing can be shared."""
    pictures: Sequence[Image.Image] = [picture.copy() for picture in request.prompt.pictures]
    for picture in pictures:
        picture.putpixel((0, 0), (number, 255 - number, 128))
    texts = [part for part in request.prompt.parts if not hasattr(part, "image")]
    return replace(request, prompt=Prompt.build([*pictures, *texts]))
