"""Keeps requests on their way, of an endless file if need be, in calls as large as memory allows.

A window of requests is looked at. What goes on is the first of these that there is: latents are decoded; a
full pack is drawn; else the window is filled, and all that is in it is read, then written; else what there is
is drawn. So packs of pictures stay full while requests come, and samples leave as they are done. What is held
for a request goes with its session.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from realign.runtime.ahead import Ahead
from realign.runtime.budget import Budget, Costs, MemoryShortage, find_free_bytes, is_out_of_memory
from realign.runtime.planner import Bounds, Pack, choose_pack
from realign.runtime.reader import MetPicture, Reader
from realign.runtime.request import ImagePart, Request, Sample
from realign.runtime.session import Session
from realign.runtime.stages import DecodeStage, DrawStage, ReadStage, Stage, WriteStage

if TYPE_CHECKING:
    from realign.runtime.engine import Engine

# Tokens of a forward, by the kind of device: more make it no faster, and samples later.
ENOUGH_TOKENS = {"cpu": 2400, "cuda": 3 * 2**16}
# Requests whose pictures are loaded and fitted to the model ahead of the window.
DEPTH = {"cpu": 16, "cuda": 16}
# Of the budget, what the contexts may take that wait for their turn.
CONTEXT_SHARE = 0.5


@dataclass(frozen=True)
class StreamOptions:
    """How much goes on at a time; no sample depends on it.

    Attributes:
        window: requests that are looked at together.
        batch_size: requests in one call at most; None: as many as memory takes and the device can use.
        picture_bytes: of reference pictures, as given and as fitted to the model, that the window may hold.
    """

    window: float = 128
    batch_size: int | None = None
    picture_bytes: float = 2 * 2**30

    def __post_init__(self) -> None:
        for name, value in (("window", self.window), ("batch_size", self.batch_size)):
            if value is not None and not value >= 1:
                raise ValueError(f"{name} is {value!r}: must be at least 1")


class Stream:
    """The samples of `requests` with the requests' numbers, as they are done; to be closed."""

    def __init__(self, engine: Engine, requests: Iterable[Request], options: StreamOptions) -> None:
        self.engine, self.options, model = engine, options, engine.model
        costs = Costs.of(model)
        self.kv_token = costs.kv_token
        memory = find_free_bytes(model.device) if engine.memory_bytes is None else engine.memory_bytes
        self.budget = Budget(memory, engine.lowered)
        self.reader = Reader(model, engine.prepare, 0, engine.backend, engine.run_tokens)
        self.read = ReadStage(model, costs, self.reader)
        self.write = WriteStage(model, costs, self.reader, engine.record)
        self.draw = DrawStage(model, costs, engine.backend, engine.keep_steps, engine.record)
        self.decode = DecodeStage(model, costs)
        self.enough_tokens = ENOUGH_TOKENS[model.device.type]
        self.sessions: list[Session] = []
        self.num_admitted, self.has_more = 0, True
        self.coming = Ahead(map(self._meet, requests), DEPTH[model.device.type])

    def __iter__(self) -> Iterator[tuple[int, Sample]]:
        while True:
            chosen = self._choose()
            if chosen is not None:
                self._attempt(*chosen)
            finished = [session for session in self.sessions if session.is_done]
            self.sessions = [session for session in self.sessions if not session.is_done]
            while finished:  # held here no longer than it takes
                session = finished.pop(0)
                yield session.number, session.sample
            if chosen is None and not self.sessions:
                return

    def close(self) -> None:
        """Take no more requests."""
        self.coming.close()

    def _choose(self) -> tuple[Stage, Pack] | None:
        """What to do next; None where nothing waits."""
        if (pack := self._plan(self.decode)) is not None:
            return self.decode, pack
        if (pack := self._plan(self.draw)) is not None and pack.is_full:
            return self.draw, pack
        self._fill_window()
        for stage in (self.read, self.write, self.draw):
            if (pack := self._plan(stage)) is not None:
                return stage, pack
        return None

    def _plan(self, stage: Stage) -> Pack | None:
        """What the next call of a stage takes; None for nothing, or for want of memory until others end."""
        ready = self._find_ready(stage)
        if not ready:
            return None
        loads = [stage.measure(session) for session in ready]
        num_bytes = self._find_room(stage)
        if stage is self.read and loads[0].bytes > num_bytes and len(ready) < len(self.sessions):
            return None
        if stage is self.write:
            num_bytes = math.inf  # in its calls rows wait for others to end
        return choose_pack(loads, Bounds(num_bytes, self.enough_tokens, self.options.batch_size or math.inf))

    def _find_ready(self, stage: Stage) -> list[Session]:
        return [session for session in self.sessions if stage.is_next(session)]

    def _find_room(self, stage: Stage) -> int:
        """Bytes that a call of a stage may take now."""
        held = self.kv_token * self.reader.count_held()
        if stage is self.read:
            held += int((1 - CONTEXT_SHARE) * self.budget.limit)
        return self.budget.room(stage.name, held)

    def _attempt(self, stage: Stage, pack: Pack) -> None:
        """One call of a stage. If memory runs out, nothing of it is kept, and the next call is smaller."""
        ready, room = self._find_ready(stage), self._find_room(stage)
        sessions = [ready[row] for row in pack.rows]
        try:
            results = stage.carry_out(sessions, room)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            results = None
        if results is None:  # the error is gone, and with it the frames that held what the call had made
            self._shrink(stage, sessions, pack, room)
            return
        for session, result in zip(sessions, results, strict=True):
            stage.deliver(session, result)

    def _shrink(self, stage: Stage, sessions: list[Session], pack: Pack, room: int) -> None:
        """Halve what a call may take; where that cannot be cut, free what others hold; else give up.

        Raises: MemoryShortage
        """
        gc.collect()
        if self.engine.model.device.type == "cuda":
            torch.cuda.empty_cache()
        used = min(pack.bytes, max(room, pack.largest))
        others = [session for session in self.sessions if session is not sessions[0] and session.has_begun]
        if used > pack.largest:
            self.budget.lower(stage.name, used)
        elif others:
            self.budget.limit //= 2
            for session in others:
                session.begin()
        else:
            what = f"too little memory for {stage.name} request {sessions[0].request.id!r} by itself"
            raise MemoryShortage(f"{what}: make its picture or its references smaller, or free memory")
        self.engine.report(f"out of memory while {stage.name}: half as much at a time from here on")

    def _fill_window(self) -> None:
        """Take requests, in their order, until the window or the memory for pictures is full."""
        while self.has_more and len(self.sessions) < self.options.window and self._has_picture_room():
            coming = next(self.coming, None)
            if coming is None:
                self.has_more = False
                return
            request, pictures = coming
            size = self.engine.find_size(request, self.reader.meet)
            self.engine.check(request, size)
            start = self.engine.programs[request.settings.reasoning]
            self.sessions.append(Session(self.num_admitted, request, size, start, pictures))
            self.num_admitted += 1

    def _has_picture_room(self) -> bool:
        """Whether the window may have another request's pictures; always if it is empty."""
        held: dict[int, int] = {}
        for session in self.sessions:
            held.update(session.picture_bytes)
        return not self.sessions or sum(held.values()) < self.options.picture_bytes

    def _meet(self, request: Request) -> tuple[Request, tuple[MetPicture, ...]]:
        """Fit a request's pictures to the model, in the thread that goes ahead."""
        parts = (part for part in request.prompt.parts if isinstance(part, ImagePart))
        return request, tuple(self.reader.meet(part) for part in parts)
