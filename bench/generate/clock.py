"""What the time went into, by phase.

The baseline says itself what it does; the engine's functions are wrapped from outside, and are looked for by
name: where one is gone, this says so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

# `reading` the prompt, `reasoning` writing a text, `rereading` what was written, `autoencoder` both ways, to
# the finished picture; what no phase claims (checks, schedules, PNGs, bookkeeping) is `other`.
PHASES = ("reading", "reasoning", "rereading", "denoising", "autoencoder", "other")


class Clock:
    """Seconds by phase. A phase within another interrupts it: no time counts twice.

    Args:
        device: on CUDA every change of phase waits for the device, so that its work counts where it began.
        phases: those that there are.
        closed: of these, those that no phase within interrupts.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        phases: Sequence[str] = PHASES,
        closed: Sequence[str] = (),
    ) -> None:
        self.device, self.closed = torch.device(device), frozenset(closed)
        self.seconds = dict.fromkeys(phases, 0.0)
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within this, time counts for the phase."""
        self._book()
        current = self._running[-1] if self._running else ""
        self._running.append(current if current in self.closed else name)
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    def _book(self) -> None:
        """Give the time since the last change to the phase that is running."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


class NoClock:
    """Keeps no time, and waits for nothing."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Nothing but what is within."""
        yield


def always(name: str) -> Callable[..., str]:
    """This phase, whatever the arguments."""
    return lambda *args: name


def _name_reading(reader: Any, readings: Any) -> str:
    """What goes on after a context is what the model wrote."""
    return "rereading" if any(reading.start.length for reading in readings) else "reading"


# Module, function or method, and the phase of a call with its positional arguments.
Place = tuple[str, str, Callable[..., str]]
ENGINE_PLACES: tuple[Place, ...] = (
    ("realign.runtime.reader", "Reader.read", _name_reading),
    ("realign.runtime.reader", "Reader.finish", always("rereading")),
    ("realign.runtime.stages", "decode_text", always("reasoning")),
    ("realign.runtime.stages", "denoise", always("denoising")),
    ("realign.runtime.stages", "decode_pictures", always("autoencoder")),
    ("realign.model.autoencoder", "Autoencoder.encode", always("autoencoder")),
    ("realign.model.autoencoder", "Autoencoder.decode", always("autoencoder")),
)


@contextlib.contextmanager
def watch_engine(clock: Clock | NoClock) -> Iterator[None]:
    """Within this, engines tell the clock their phases; all else is `other`."""
    with watch_places(clock, ENGINE_PLACES):
        yield


@contextlib.contextmanager
def watch_places(clock: Clock | NoClock, places: Sequence[Place]) -> Iterator[None]:
    """Within this, functions tell the clock their phases; all else is `other`.

    Raises: LookupError naming a function that is not where it was.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(clock, Clock):
            for module, path, name_phase in places:
                stack.enter_context(_wrapped(module, path, name_phase, clock))
        stack.enter_context(clock.phase("other"))
        yield


@contextlib.contextmanager
def _wrapped(module: str, path: str, name_phase: Callable[..., str], clock: Clock) -> Iterator[None]:
    """The function within the module, its calls put on the clock, until this ends."""
    *owners, name = path.split(".")
    try:
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        function = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise LookupError(f"{module}.{path} is not there ({error}): mend the list of places") from error

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with clock.phase(name_phase(*args)):
            return function(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)
