"""Makes a workload with the engine and with the baseline, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.generate.baseline import Baseline, Made
from bench.generate.clock import Clock, NoClock, watch_engine
from bench.generate.workloads import Workload
from realign.evals.golden import relative_error
from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.memory import forget_peak, read_peak_mb
from realign.runtime.request import Request

# In float32 both give the same pictures. What a whole loop of steps may differ by, relative to the largest.
LATENT_TOLERANCE = 1e-3

Make = Callable[[Clock | NoClock], Any]


@dataclass
class Run:
    """Turns of one implementation.

    Attributes:
        make: one turn; tells the clock its phases.
        prepare: what comes before each turn, and is not timed.
        build_clock: a clock of a turn on a device.
        scale: images of the workload for each that a turn makes.
        made: what the last turn returned.
        seconds, cpu_seconds: of each turn that was timed; for all images of the workload. The second is the
            processor time of the process, all its threads.
        phases: the same of each turn that was clocked.
        peak_mb: the most memory that was held.
    """

    make: Make
    scale: float = 1.0
    prepare: Callable[[], None] = lambda: None
    build_clock: Callable[[torch.device], Clock] = Clock
    made: Any = ()
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    peak_mb: float = 0.0

    def take_turn(self, device: torch.device, is_timed: bool, is_clocked: bool) -> None:
        """One turn. On CUDA the clock waits for the device, so that a turn is timed or clocked there."""
        self.prepare()
        clock = self.build_clock(device) if is_clocked else NoClock()
        forget_peak(device)
        begin, cpu_begin = time.perf_counter(), time.process_time()
        self.made = self.make(clock)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if is_timed:
            self.seconds.append(self.scale * (time.perf_counter() - begin))
            self.cpu_seconds.append(self.scale * (time.process_time() - cpu_begin))
        if isinstance(clock, Clock):
            self.phases.append({name: self.scale * spent for name, spent in clock.seconds.items()})
        self.peak_mb = max(self.peak_mb, read_peak_mb(device))

    @property
    def median_phases(self) -> dict[str, float]:
        """Seconds of each phase."""
        return {name: statistics.median(one[name] for one in self.phases) for name in self.phases[0]}

    @property
    def num_tokens(self) -> float:
        """Tokens of the texts of all images."""
        return self.scale * sum(len(made.turn.ids) for made in self.made if made.turn is not None)


@dataclass
class Measured:
    """The runs of a workload; `baseline` is None where it has none."""

    engine: Run
    baseline: Run | None = None
    latent_error: float = 0.0


def measure_workload(model: Bagel, workload: Workload, num_turns: int, num_baseline: int) -> Measured:
    """All requests with the engine, the first `num_baseline` with the baseline, `num_turns` times in turn.

    Raises: ValueError where both do not make the same in float32: then no time is worth a row.
    """
    requests = list(workload.requests)
    some = requests[:num_baseline]
    measured = Measured(Run(lambda clock: make_with_engine(model, requests, clock)))
    make_with_engine(model, requests, NoClock())  # what happens once happens here
    if workload.has_baseline:
        scale = len(requests) / len(some)
        measured.baseline = Run(lambda clock: make_with_baseline(model, some, clock), scale)
        make_with_baseline(model, some[:1], NoClock())
    take_turns(measured, model.device, num_turns)
    if measured.baseline:
        pairs = list(zip(measured.engine.made, measured.baseline.made, strict=False))
        measured.latent_error = compare_latents(pairs)
        if model.dtype == torch.float32:
            check_same(pairs, measured.latent_error)
    return measured


def take_turns(measured: Measured, device: torch.device, num_turns: int) -> None:
    """Engine and baseline one after the other, so often."""
    for is_timed, is_clocked in list_turns(device, num_turns):
        for run in (measured.engine, measured.baseline):
            if run is not None:
                run.take_turn(device, is_timed, is_clocked)


def list_turns(device: torch.device, num_turns: int) -> list[tuple[bool, bool]]:
    """Whether each is timed, is clocked: on a CPU both; on CUDA phases have one more turn of their own."""
    if device.type != "cuda":
        return [(True, True)] * num_turns
    return [(True, False)] * num_turns + [(False, True)]


def make_with_engine(model: Bagel, requests: Sequence[Request], clock: Clock | NoClock) -> list[Made]:
    """All requests together."""
    with watch_engine(clock):
        samples = Engine(model, PROGRAMS).run(requests)
    turns = [next(iter(sample.trajectory.text_turns), None) for sample in samples]
    return [
        Made(turn, sample.trajectory.latent_LC, sample.image)
        for turn, sample in zip(turns, samples, strict=True)
    ]


def make_with_baseline(model: Bagel, requests: Iterable[Request], clock: Clock | NoClock) -> list[Made]:
    """One request after the other."""
    baseline = Baseline(model, clock=clock)
    return [baseline.run(request) for request in requests]


def compare_latents(pairs: Sequence[tuple[Made, Made]]) -> float:
    """The largest relative difference between the engine's and the baseline's."""
    return max(relative_error(ours.latent_LC, theirs.latent_LC.cpu()) for ours, theirs in pairs)


def check_same(pairs: Sequence[tuple[Made, Made]], latent_error: float) -> None:
    """Raises: ValueError if texts differ, or latents by too much."""
    for ours, theirs in pairs:
        if ours.turn != theirs.turn:
            raise ValueError(f"the engine wrote {ours.turn}, the baseline {theirs.turn}: no time counts")
    if not latent_error <= LATENT_TOLERANCE:
        raise ValueError(f"latents of engine and baseline differ by {latent_error:.1e}: no time counts")
