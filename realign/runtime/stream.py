"""Keeps requests on their way, of an endless file if need be, in calls as large as memory allows.

A window of requests is looked at. What goes on is the first of these that there is: latents are decoded; a
full pack is drawn; else the window is filled, and all that is in it is read, then written; else what there is
is drawn. So packs of pictures stay full while requests come, and samples leave as they are done. Nothing
waits for a request that is long in coming while others can go on. What is held for a request goes with its
session.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from realign.runtime.ahead import Ahead
from realign.runtime.budget import Budget, Costs, MemoryShortage, find_free_bytes, is_out_of_memory
from realign.runtime.planner import Bounds, Pack, choose_pack
from realign.runtime.reader import MetPicture, Reader
from realign.runtime.request import ImagePart, Request, Sample
from realign.runtime.session import Session, count_picture_bytes
from realign.runtime.stages import DecodeStage, DrawStage, ReadStage, Stage, WriteStage

if TYPE_CHECKING:
    from realign.runtime.engine import Engine

# Tokens of a forward, by the kind of device: more make it no faster, and samples later.
ENOUGH_TOKENS = {"cpu": 2400, "cuda": 3 * 2**16}
# Of the budget, what the contexts may take that wait for their turn.
CONTEXT_SHARE = 0.5


@dataclass(frozen=True)
class StreamOptions:
    """How much goes on at a time; no sample depends on it.

    Attributes:
        window: requests that are looked at together.
        batch_size: requests in one call at most; None: as many as memory takes and the device can use.
        picture_bytes: of reference pictures, as given and as fitted to the model, that may be held at a time;
            one request's always may.
        ahead: requests beyond the window that may be taken, and their pictures fitted to the model.
        patience: seconds to wait for the next request where there are others to go on with.
    """

    window: float = 128
    batch_size: int | None = None
    picture_bytes: float = 2 * 2**30
    ahead: float = 16
    patience: float = 0.2

    def __post_init__(self) -> None:
        leasts = {"window": 1, "batch_size": 1, "picture_bytes": 0, "ahead": 0, "patience": 0}
        for name, least in leasts.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} is {value!r}: must be at least {least}")


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
        self.decode = DecodeStage(model, costs, engine.record)
        self.enough_tokens = ENOUGH_TOKENS[model.device.type]
        self.sessions: list[Session] = []
        self.num_met = self.num_admitted = self.num_done = 0
        self.has_more = True
        self.coming = Ahead(map(self._meet, requests), self._may_meet)

    def __iter__(self) -> Iterator[tuple[int, Sample]]:
        while self.has_more or self.sessions:
            self._go_on()
            finished = [session for session in self.sessions if session.is_done]
            self.sessions = [session for session in self.sessions if not session.is_done]
            while finished:  # held here no longer than it takes
                self.num_done += 1
                self.coming.go_on()
                yield finished[0].number, finished.pop(0).sample

    def close(self) -> None:
        """Take no more requests."""
        self.coming.close()

    def _go_on(self) -> None:
        chosen = self._choose()
        if chosen is not None:
            self._attempt(*chosen)

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
        held = self.kv_token * self.reader.count_held() + self.decode.count_held()
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
        room = self.budget.room(stage.name, 0) / 2**20
        what = f"out of memory while {stage.name}: half as much at a time from here on"
        self.engine.report(f"{what}, at most {room:.4g} MiB")

    def _fill_window(self) -> None:
        """Take requests, in their order, until the window is full or none is there."""
        while self.has_more and len(self.sessions) < self.options.window:
            if self.sessions and not self.coming.is_ready(self.options.patience):
                return
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

    def _may_meet(self, waiting: Collection[tuple[Request, tuple[MetPicture, ...]]]) -> bool:
        """Whether one more request may be taken, beside the sessions and those that wait to be some."""
        num_held = self.num_met - self.num_done
        if num_held >= self.options.window + self.options.ahead:
            return False
        held: dict[int, int] = {}
        for request, pictures in (*((one.request, one.pictures) for one in self.sessions), *waiting):
            held.update(count_picture_bytes(request, pictures))
        return not num_held or sum(held.values()) < self.options.picture_bytes

    def _meet(self, request: Request) -> tuple[Request, tuple[MetPicture, ...]]:
        """Fit a request's pictures to the model, in the thread that goes ahead."""
        self.num_met += 1
        parts = (part for part in request.prompt.parts if isinstance(part, ImagePart))
        return request, tuple(self.reader.meet(part) for part in parts)
