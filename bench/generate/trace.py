"""What the host does for a denoising step: launches, and waits for the device; from torch's profiler.

Counted as the difference between two runs of different numbers of steps, so that what comes before and after
the steps falls out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from realign.runtime.request import Request

FEW, MORE = 4, 8  # timesteps of the two runs
# Calls of the host, as the profiler names them: what gives the device work (a graph is one), and what returns
# only when the device has done something.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Counts:
    """Of a step. -1: not counted.

    Attributes:
        kernels: what ran on the device, copies and fills among it.
        launches: calls that gave it work.
        syncs: calls that waited for it.
    """

    kernels: float = -1.0
    launches: float = -1.0
    syncs: float = -1.0


@dataclass(frozen=True)
class Event:
    """What the profiler saw: its name, whether it ran on the device, how often."""

    name: str
    is_device: bool
    count: int


def count_events(events: Iterable[Event]) -> Counts:
    """The counts of a whole run."""
    events = list(events)
    on_host = [event for event in events if not event.is_device]
    return Counts(
        sum(event.count for event in events if event.is_device),
        sum(event.count for event in on_host if event.name.startswith(LAUNCHES)),
        sum(event.count for event in on_host if event.name in WAITS),
    )


def count_per_step(run: Callable[[list[Request]], object], requests: list[Request]) -> Counts:
    """What one more step adds; all of the branches act on it."""
    totals = []
    for num_timesteps in (FEW, MORE):
        chosen = [_with_steps(request, num_timesteps) for request in requests]
        run(chosen)  # what happens once happens here
        totals.append(count_events(profile(lambda chosen=chosen: run(chosen))))
    few, more = (vars(total).values() for total in totals)
    return Counts(*((b - a) / (MORE - FEW) for a, b in zip(few, more, strict=True)))


def profile(run: Callable[[], object]) -> list[Event]:
    """The events of a run on CUDA."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [
        Event(event.key, event.device_type == on_device, event.count) for event in profiler.key_averages()
    ]


def _with_steps(request: Request, num_timesteps: int) -> Request:
    """The request with other steps, all in its guidance interval, and without the reasoning before them."""
    guidance = replace(request.settings.guidance, interval=(0.0, 1.0))
    settings = replace(request.settings, num_timesteps=num_timesteps, guidance=guidance, reasoning="none")
    return replace(request, settings=settings)
