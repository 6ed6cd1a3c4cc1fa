"""The four kinds of work that requests wait for, each done for many of them in one call.

Reading and writing give contexts, drawing latents, decoding pictures. A stage says what a waiting request
adds to a call, and carries out a call; which requests go into it is the stream's to choose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import lru_cache
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from realign.model.bagel import Bagel
from realign.runtime.attention import Backend
from realign.runtime.attention.rows import padded_length
from realign.runtime.budget import Costs
from realign.runtime.kv import Context
from realign.runtime.noise import NoiseKey
from realign.runtime.operations import Draw, Drawn, Read, Write
from realign.runtime.pictures import decode_pictures
from realign.runtime.planner import Load
from realign.runtime.reader import Reader
from realign.runtime.recording import NoisyStep, Recording
from realign.runtime.request import ImagePart
from realign.runtime.sampler import DenoiseJob, denoise, num_latent_tokens
from realign.runtime.schedule import Schedule
from realign.runtime.session import Denoised, Session
from realign.runtime.settings import KEPT_POSITIONS, NoiseSettings, TextSettings
from realign.runtime.text import Written, decode_text, slot_size


@lru_cache(maxsize=64)
def build_schedule(num_timesteps: int, shift: float, noise: NoiseSettings) -> Schedule:
    """The schedule of a request's settings."""
    schedule = Schedule.build(num_timesteps, shift)
    return schedule.with_noise(noise.rule, noise.level, noise.bounds) if noise.is_on else schedule


class Stage(ABC):
    """One kind of work.

    Attributes:
        name: for messages: what is done.
    """

    name: ClassVar[str]

    def __init__(self, model: Bagel, costs: Costs) -> None:
        self.model, self.costs = model, costs

    @abstractmethod
    def is_next(self, session: Session) -> bool:
        """Whether the session waits for this."""

    @abstractmethod
    def measure(self, session: Session) -> Load:
        """What the session adds to a call."""

    @abstractmethod
    def carry_out(self, sessions: Sequence[Session], room: int) -> list[Any]:
        """One result for each session; as far as the work can be cut, no more than `room` bytes at a time."""

    def deliver(self, session: Session, result: Any) -> None:
        """Let the session go on."""
        session.resume(result)


class ReadStage(Stage):
    """Prompts to contexts; what several read alike is read once."""

    name = "reading"

    def __init__(self, model: Bagel, costs: Costs, reader: Reader) -> None:
        super().__init__(model, costs)
        self.reader = reader
        self.loads: WeakKeyDictionary[Read, Load] = WeakKeyDictionary()

    def is_next(self, session: Session) -> bool:
        return isinstance(session.waiting, Read)

    def measure(self, session: Session) -> Load:
        """Neighbours are those that begin alike."""
        read = session.waiting
        if read not in self.loads:
            parts = (part for reading in read.readings for part in reading.parts)
            session.pictures = tuple(self.reader.meet(p) for p in parts if isinstance(p, ImagePart))
            lengths: dict[int, int] = {}
            for reading in read.readings:
                lengths.update(self.reader.measure(reading))
            shares = {place: self.costs.read_token * length for place, length in lengths.items()}
            names = [name for reading in read.readings for name in self.reader.name_blocks(reading.parts)]
            # Blocks are read one after another, so a forward has about one of them.
            self.loads[read] = Load(tuple(names), shares, max(lengths.values(), default=0))
        return self.loads[read]

    def carry_out(self, sessions: Sequence[Session], room: int) -> list[list[Context]]:
        self.reader.max_tokens = room // self.costs.read_token
        readings = [session.waiting.readings for session in sessions]
        contexts = iter(self.reader.read([reading for own in readings for reading in own]))
        return [[next(contexts) for _ in own] for own in readings]

    def deliver(self, session: Session, result: list[Context]) -> None:
        session.pictures = ()
        super().deliver(session, result)


class WriteStage(Stage):
    """Texts after contexts; rows that end make room for others, so that all go into one call.

    Args:
        record: keep the log-probs of what is written; and read it again, in one piece, as who is given the
            text reads it: the last bits of keys and values differ from those that were kept while writing.
    """

    name = "writing"

    def __init__(self, model: Bagel, costs: Costs, reader: Reader, record: bool = False) -> None:
        super().__init__(model, costs)
        self.reader, self.record = reader, record

    def is_next(self, session: Session) -> bool:
        return isinstance(session.waiting, Write)

    def measure(self, session: Session) -> Load:
        size = slot_size(session.waiting.context, self._cut_to_positions(session))
        row = self.costs.forward_token + self.costs.scores_row
        return Load((size,), {session.number: size * self.costs.kv_token + row}, 1)

    def carry_out(self, sessions: Sequence[Session], room: int) -> list[Written]:
        contexts = [session.waiting.context for session in sessions]
        settings = [self._cut_to_positions(session) for session in sessions]
        requests = [session.request for session in sessions]
        keys = [
            NoiseKey(request.seed, request.id, session.waiting.turn, "text")
            for request, session in zip(requests, sessions, strict=True)
        ]
        slot = max(map(slot_size, contexts, settings))
        row = max(sum(self.measure(session).shares.values()) for session in sessions)
        max_tokens = slot * max(1, room // row)
        self.reader.max_tokens = room // self.costs.read_token
        written = decode_text(
            self.model, contexts, settings, keys, max_tokens, self.reader.backend, self.record
        )
        return self.reader.finish(contexts, written, self.record)

    def _cut_to_positions(self, session: Session) -> TextSettings:
        """How the session writes: no more tokens than the model has positions for."""
        settings, limit = session.request.settings.text, self.model.config.llm.max_position_embeddings
        left = max(1, limit - session.waiting.context.next_position - KEPT_POSITIONS)
        return replace(settings, max_tokens=min(settings.max_tokens, left))


class DrawStage(Stage):
    """From noise to latents.

    Args:
        keep_steps: keep the latents of every step.
        record: keep the stochastic steps.
    """

    name = "drawing"

    def __init__(
        self, model: Bagel, costs: Costs, backend: Backend | None, keep_steps: bool, record: bool
    ) -> None:
        super().__init__(model, costs)
        self.backend, self.keep_steps, self.record = backend, keep_steps, record

    def is_next(self, session: Session) -> bool:
        return isinstance(session.waiting, Draw) and session.denoised is None

    def measure(self, session: Session) -> Load:
        """Neighbours compute the same steps and end together, with pictures and contexts of like sizes."""
        settings, contexts = session.request.settings, [b.context for b in session.waiting.branches]
        size = num_latent_tokens(self.model, *session.size) + 2
        held = sum(padded_length(context.tail_length) for context in contexts)
        num_tokens = len(contexts) * size
        num_bytes = (held + num_tokens) * self.costs.kv_token + num_tokens * self.costs.forward_token
        noise = settings.noise
        noisy = (noise.rule, noise.level, noise.bounds or ()) if noise.is_on else ()
        steps = (settings.num_timesteps, astuple(settings.caching), noisy)
        order = (*steps, *session.size, len(contexts), contexts[0].length)
        return Load(order, {session.number: num_bytes}, num_tokens)

    def carry_out(self, sessions: Sequence[Session], room: int) -> list[Denoised]:
        jobs = [_build_job(session) for session in sessions]
        steps: list[list[Tensor]] = [[] for _ in jobs]
        noisy: list[list[NoisyStep]] = [[] for _ in jobs]

        def keep(step: int, current: list[Tensor | None]) -> None:
            for own, latent_LC in zip(steps, current, strict=True):
                if latent_LC is not None:
                    own.append(latent_LC.to("cpu", copy=True))

        on_step = keep if self.keep_steps else None
        on_noisy_step = (lambda job, step: noisy[job].append(step)) if self.record else None
        latents = denoise(self.model, jobs, on_step, self.backend, on_noisy_step)
        company = tuple(session.request.id for session in sessions)
        recordings = [Recording(tuple(own), company) if self.record else None for own in noisy]
        return [Denoised(*made) for made in zip(jobs, latents, map(tuple, steps), recordings, strict=True)]

    def deliver(self, session: Session, result: Denoised) -> None:
        session.denoised = result


class DecodeStage(Stage):
    """Latents to pictures.

    Args:
        record: pictures stay on the device.
    """

    name = "decoding"

    def __init__(self, model: Bagel, costs: Costs, record: bool = False) -> None:
        super().__init__(model, costs)
        self.record = record
        self.made: list[ref[Tensor]] = []

    def is_next(self, session: Session) -> bool:
        return session.denoised is not None

    def measure(self, session: Session) -> Load:
        height, width = session.size
        return Load(session.size, {session.number: height * width * self.costs.pixel})

    def carry_out(self, sessions: Sequence[Session], room: int) -> list[Drawn]:
        denoised = [session.denoised for session in sessions]
        jobs, latents = [one.job for one in denoised], [one.latent_LC for one in denoised]
        pictures = decode_pictures(self.model, jobs, latents, self.record)
        if self.record:
            self.made += map(ref, pictures)
        return [
            Drawn(picture, one.job.key, one.latent_LC.to("cpu", copy=True), one.steps, one.recording)
            for picture, one in zip(pictures, denoised, strict=True)
        ]

    def count_held(self) -> int:
        """Bytes of the pictures on the device that it made and somebody still holds."""
        held = [picture for made in self.made if (picture := made()) is not None]
        self.made = list(map(ref, held))
        return sum(picture.nbytes for picture in held)

    def deliver(self, session: Session, result: Drawn) -> None:
        session.denoised = None
        super().deliver(session, result)


def _build_job(session: Session) -> DenoiseJob:
    request, settings = session.request, session.request.settings
    return DenoiseJob(
        session.waiting.branches,
        *session.size,
        build_schedule(settings.num_timesteps, settings.timestep_shift, settings.noise),
        settings.guidance,
        NoiseKey(request.seed, request.id, session.waiting.picture, "initial"),
        session.waiting.noise_LC,
        settings.caching,
        session.waiting.replayed,
    )
