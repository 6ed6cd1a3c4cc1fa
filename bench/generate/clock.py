"""What the time went into, by phase: whoever works says so, or is wrapped from outside."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

# `reading` the prompt, `rereading` a text that the model wrote itself, `reasoning` writing it, `autoencoder`
# both ways; what no phase claims (schedules, PNGs, bookkeeping) is `other`.
PHASES = ("reading", "rereading", "reasoning", "denoising", "autoencoder", "other")


class Clock:
    """Seconds by phase. A phase within another interrupts it: no time counts twice.

    Args:
        device: on CUDA every change of phase waits for the device, so that its work counts where it began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.running: list[str] = []
        self.since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within this, time counts for the phase."""
        self._book()
        self.running.append(name)
        try:
            yield
        finally:
            self._book()
            self.running.pop()

    def wrap(self, name: str, function: Callable) -> Callable:
        """The function; its time counts for the phase."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return run

    def _book(self) -> None:
        """Give the time since the last change to the phase that is running."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now


class NoClock:
    """Keeps no time."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Nothing but what is within."""
        yield
