"""Runs a batch of requests to pictures: read, write, draw, each for all requests at once.

What a request reads and writes, in what order, is its program: a generator that yields operations (`Read`,
`Write`, `Draw`) and gets their results. The engine keeps the programs of a batch side by side and carries out
their operations together, reading first, then writing, then drawing, so that each happens in the largest
batch there is.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from realign.model.bagel import Bagel, unpatchify_latent
from realign.model.config import BagelConfig
from realign.runtime.attention import find_backend, pack_rows
from realign.runtime.context import num_pictures_at_once
from realign.runtime.guidance import Branch
from realign.runtime.kv import Context
from realign.runtime.noise import NoiseKey
from realign.runtime.prepare import PreparedPicture, fit_picture, to_picture
from realign.runtime.reader import Reader, Reading
from realign.runtime.request import (
    ImagePart,
    Prompt,
    Reasoning,
    Request,
    Sample,
    TextPart,
    Trajectory,
)
from realign.runtime.sampler import DenoiseJob, denoise, num_latent_tokens
from realign.runtime.schedule import Schedule
from realign.runtime.settings import Settings
from realign.runtime.text import MIN_ROOM, Written, decode_text

__all__ = [
    "Draw",
    "Drawn",
    "Engine",
    "ImagePart",
    "Program",
    "Prompt",
    "Read",
    "Reading",
    "Reasoning",
    "Request",
    "Sample",
    "Settings",
    "TextPart",
    "Trajectory",
    "Write",
]


@dataclass(frozen=True, eq=False)
class Read:
    """Gives a list of contexts, one for each reading. Readings that begin alike share what they share."""

    readings: tuple[Reading, ...]


@dataclass(frozen=True, eq=False)
class Write:
    """Gives a `Written` that has read the whole turn; `turn` numbers a request's texts, for their noise."""

    context: Context
    turn: int = 0


@dataclass(frozen=True, eq=False)
class Draw:
    """Gives a `Drawn`; `picture` numbers a request's pictures, for their noise.

    `noise_LC` is initial noise to take instead, float32 [tokens, C].
    """

    branches: tuple[Branch, ...]
    picture: int = 0
    noise_LC: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """A picture, and as in `Trajectory` how it came about."""

    image: Image.Image
    noise_key: NoiseKey
    latent_LC: Tensor
    steps: tuple[Tensor, ...]


Operation = Read | Write | Draw
Program = Callable[[Request], Generator[Operation, Any, Sample]]


class Engine:
    """Makes samples of requests with one model.

    Args:
        model: with its tokenizer.
        programs: the program of every reasoning mode, usually `realign.reasoning.programs.PROGRAMS`.
        prepare: how reference pictures are fitted to the model.
        max_cache_bytes: bound on the keys and values that are padded together; a batch that needs more is
            worked on in parts. Default: 2 GiB on a CPU, a quarter of the memory of another device.
        keep_steps: keep the latents of every step in the trajectories.
        attention: a name of `realign.runtime.attention.BACKENDS`, or "auto"; `engine.backend` is the one
            taken.
        run_tokens: see `Reader`.

    Raises: ValueError for an attention backend that is none, or cannot run here.
    """

    def __init__(
        self,
        model: Bagel,
        programs: Mapping[str, Program],
        prepare: Callable[[Image.Image, BagelConfig], PreparedPicture] = fit_picture,
        max_cache_bytes: int | None = None,
        keep_steps: bool = False,
        attention: str = "auto",
        run_tokens: int | None = None,
    ) -> None:
        self.model, self.programs, self.keep_steps = model, programs, keep_steps
        self.prepare, self.run_tokens = prepare, run_tokens
        self.backend = find_backend(model.device, attention)
        llm = model.config.llm
        token_bytes = (
            2 * llm.num_hidden_layers * llm.num_key_value_heads * llm.head_dim * model.dtype.itemsize
        )
        self.max_tokens = (max_cache_bytes or _default_cache_bytes(model.device)) // token_bytes

    def run(self, requests: Sequence[Request]) -> list[Sample]:
        """All requests as one batch.

        Raises: ValueError, before any work, for a reasoning mode without a program, a size that does not
            fit, or more text than the model has positions for.
        """
        return _Batch(self, requests).run()

    def check(self, request: Request, size: tuple[int, int]) -> None:
        """Raise ValueError for a reasoning mode without a program, a size that the model cannot draw, or more
        text than it can read.
        """
        mode, config = request.settings.reasoning, self.model.config
        if mode not in self.programs:
            known = ", ".join(self.programs)
            raise ValueError(f"request {request.id!r}: no program for reasoning {mode!r}: there is {known}")
        stride, largest = config.latent_stride, config.latent_stride * config.max_latent_size
        for name, side in zip(("height", "width"), size, strict=True):
            if side % stride or not stride <= side <= largest:
                bounds = f"a multiple of {stride} from {stride} to {largest}"
                raise ValueError(f"request {request.id!r}: {name} {side} must be {bounds}")
        self._check_length(request)

    def _check_length(self, request: Request) -> None:
        """A byte-level tokenizer makes at most one token of a byte, so that most prompts are not counted."""
        texts = [part.text for part in request.prompt.parts if isinstance(part, TextPart)]
        limit = self.model.config.llm.max_position_embeddings
        if sum(len(text.encode()) for text in texts) <= limit:
            return
        count = sum(len(self.model.tokenizer.encode(text)) for text in texts)
        if count > limit:
            what = f"the prompt has {count} tokens, the model reads at most {limit}"
            raise ValueError(f"request {request.id!r}: {what}: shorten it")


@dataclass(eq=False)
class _Session:
    """A request, its (height, width), its running program, what that waits for, and in the end its sample."""

    request: Request
    size: tuple[int, int]
    program: Generator[Operation, Any, Sample]
    waiting: Operation | None = None
    sample: Sample | None = None

    def resume(self, result: Any) -> None:
        try:
            self.waiting = self.program.send(result)
        except StopIteration as end:
            self.waiting, self.sample = None, end.value


class _Batch:
    """The requests of one run."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine, self.model = engine, engine.model
        self.reader = Reader(
            engine.model, engine.prepare, engine.max_tokens, engine.backend, engine.run_tokens
        )
        sizes = [self._picture_size(request) for request in requests]
        for request, size in zip(requests, sizes, strict=True):
            engine.check(request, size)
        programs = [engine.programs[request.settings.reasoning](request) for request in requests]
        self.sessions = list(map(_Session, requests, sizes, programs))

    def run(self) -> list[Sample]:
        for session in self.sessions:
            session.resume(None)
        while any(session.waiting for session in self.sessions):
            for kind, carry_out in ((Read, self._read), (Write, self._write), (Draw, self._draw)):
                ready = [session for session in self.sessions if isinstance(session.waiting, kind)]
                if ready:
                    for session, result in zip(ready, carry_out(ready), strict=True):
                        session.resume(result)
                    break
        return [session.sample for session in self.sessions]

    def _read(self, sessions: Sequence[_Session]) -> list[list[Context]]:
        readings = [session.waiting.readings for session in sessions]
        contexts = iter(self.reader.read([reading for own in readings for reading in own]))
        return [[next(contexts) for _ in own] for own in readings]

    def _picture_size(self, request: Request) -> tuple[int, int]:
        """The settings', or that of the last reference picture as the model sees it, or the model's own."""
        config, settings = self.model.config, request.settings
        if settings.height is not None:
            return settings.height, settings.width
        if not (request.prompt.pictures and config.size_follows_picture):
            return config.default_image_size
        last = [part for part in request.prompt.parts if isinstance(part, ImagePart)][-1]
        prepared = self.reader.meet(last).prepared
        return prepared.height, prepared.width

    def _write(self, sessions: Sequence[_Session]) -> list[Written]:
        contexts = [session.waiting.context for session in sessions]
        settings = [session.request.settings.text for session in sessions]
        keys = [
            NoiseKey(session.request.seed, session.request.id, session.waiting.turn, "text")
            for session in sessions
        ]
        room = [
            context.length + max(MIN_ROOM, own.max_tokens)
            for context, own in zip(contexts, settings, strict=True)
        ]
        written: dict[int, Written] = {}
        for pack in pack_rows(room, self.engine.max_tokens):
            chosen = ([values[row] for row in pack] for values in (contexts, settings, keys))
            texts = decode_text(self.model, *chosen, backend=self.engine.backend)
            written.update(zip(pack, texts, strict=True))
        return self.reader.finish(contexts, [written[row] for row in range(len(sessions))])

    def _draw(self, sessions: Sequence[_Session]) -> list[Drawn]:
        jobs = [self._build_job(session) for session in sessions]
        costs = [self._cost(job) for job in jobs]
        latents: dict[int, Tensor] = {}
        steps: dict[int, list[Tensor]] = {row: [] for row in range(len(jobs))}
        for pack in pack_rows(costs, self.engine.max_tokens):

            def keep(step: int, current: list[Tensor | None], pack: list[int] = pack) -> None:
                for row, latent_LC in zip(pack, current, strict=True):
                    if latent_LC is not None:
                        steps[row].append(latent_LC.cpu())

            observe = keep if self.engine.keep_steps else None
            done = denoise(self.model, [jobs[row] for row in pack], observe, self.engine.backend)
            latents.update(zip(pack, done, strict=True))
        images = decode_pictures(self.model, jobs, [latents[row] for row in range(len(jobs))])
        return [
            Drawn(image, job.key, latents[row].cpu(), tuple(steps[row]))
            for row, (job, image) in enumerate(zip(jobs, images, strict=True))
        ]

    def _build_job(self, session: _Session) -> DenoiseJob:
        request, settings = session.request, session.request.settings
        return DenoiseJob(
            session.waiting.branches,
            *session.size,
            Schedule.build(settings.num_timesteps, settings.timestep_shift),
            settings.guidance,
            NoiseKey(request.seed, request.id, session.waiting.picture, "initial"),
            session.waiting.noise_LC,
        )

    def _cost(self, job: DenoiseJob) -> int:
        """Padded tokens of a job: each of its branches as long as the longest."""
        longest = max(branch.context.length for branch in job.branches)
        return len(job.branches) * (longest + num_latent_tokens(self.model, job.height, job.width) + 2)


@torch.no_grad()
def decode_pictures(model: Bagel, jobs: Sequence[DenoiseJob], latents: Sequence[Tensor]) -> list[Image.Image]:
    """Latents to pictures; those of one size in one call of the autoencoder, as many as its memory allows."""
    config = model.config
    by_size: dict[tuple[int, int], list[int]] = {}
    for row, job in enumerate(jobs):
        by_size.setdefault((job.height, job.width), []).append(row)
    images: dict[int, Image.Image] = {}
    for (height, width), rows in by_size.items():
        grid = (height // config.latent_stride, width // config.latent_stride)
        count = num_pictures_at_once(model.device, height, width)
        for start in range(0, len(rows), count):
            part = rows[start : start + count]
            maps = [unpatchify_latent(latents[row], *grid, config.latent_patch_size) for row in part]
            latent_BCHW = torch.stack(maps).to(model.dtype, memory_format=torch.channels_last)
            pixels_BCHW = model.autoencoder.decode(latent_BCHW)
            images.update(zip(part, map(to_picture, pixels_BCHW), strict=True))
    return [images[row] for row in range(len(jobs))]


def _default_cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    return 2 * 2**30
