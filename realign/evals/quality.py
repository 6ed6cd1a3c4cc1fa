"""What a faster way to draw costs: the same requests and noise, drawn the plain way and the fast way.

PSNR alone tells little of where a difference comes from, and a picture that falls the other way of two good
ones has a low one; so the velocities are compared too, step by step, from the plain run's own latents: errors
of one step, which do not add up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from realign.runtime.engine import Engine
from realign.runtime.operations import Draw, Operation, Program
from realign.runtime.request import Request, Sample, TextPart
from realign.runtime.schedule import Schedule
from realign.runtime.settings import CachingSettings

BEST_PSNR = 100.0  # what equal pictures are given, in dB
# Of each picture with its text.
Score = Callable[[Sequence[Image.Image], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Compared:
    """One picture, drawn both ways.

    Attributes:
        psnr: dB, of 8-bit pictures; at most 100.
        latent_error: `|fast - plain| / |plain|` of the final latents.
        velocity_errors: the same of each step's guided velocity, both from the plain run's latents before it.
        same_text: whether the reasoning, which may differ too, is the same.
        scores: of the plain and the fast picture with their prompt, where a scorer is given.
    """

    id: str
    psnr: float
    latent_error: float
    velocity_errors: tuple[float, ...]
    same_text: bool
    scores: tuple[float, float] | None = None


def compare(
    plain: Engine,
    fast: Engine,
    requests: Sequence[Request],
    batch_size: int = 16,
    score: Score | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Draw `requests` the plain way and the fast way, batch by batch in turns, and compare.

    Args:
        plain, fast: of the same model, the second perhaps with other arithmetic; may be one engine.
        requests: with the fast way's settings; the plain way is the same without step caching.
        score: of pictures with texts, such as a CLIP cosine.
        report: gets a line after every batch.

    Returns: `{"pictures", "psnr": {"mean", "worst", "worst_id"}, "latent_error": {"mean", "worst"},
        "velocity_error": {"mean", "worst", "by_step"}, "other_texts", "seconds": {"plain", "fast"}}`, with
        `score` `"score": {"plain", "fast"}`, and `"by_picture"`: a dict of `Compared` each.
    """
    engines = {"plain": keeping_steps(plain), "fast": keeping_steps(fast)}
    seconds = dict.fromkeys(engines, 0.0)
    for engine in engines.values():  # what is compiled or loaded at first is in neither's time
        engine.run([replace(requests[0], settings=replace(requests[0].settings, num_timesteps=3))])
    compared: list[Compared] = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        made = {}
        for name, own in (("plain", list(map(without_caching, batch))), ("fast", batch)):
            begun = time.perf_counter()
            made[name] = engines[name].run(own)
            seconds[name] += time.perf_counter() - begun
        forced = replay(fast, batch, made["plain"])
        compared += _compare_batch(made["plain"], made["fast"], forced, score)
        report(f"{len(compared)} of {len(requests)} pictures compared")
    return summarise(compared) | {"seconds": {name: round(value, 3) for name, value in seconds.items()}}


def without_caching(request: Request) -> Request:
    """The request with every step computed."""
    return replace(request, settings=replace(request.settings, caching=CachingSettings()))


def keeping_steps(engine: Engine, programs: Mapping[str, Program] | None = None) -> Engine:
    """The engine, but its samples have the latents of every step; perhaps with other programs."""
    other = copy(engine)
    other.keep_steps, other.programs = True, programs or engine.programs
    return other


def replay(engine: Engine, requests: Sequence[Request], plain: Sequence[Sample]) -> list[Sample]:
    """The requests with the latents before every step taken from `plain`; the steps are what came after."""
    latents = {sample.request.id: sample.trajectory.steps for sample in plain}
    programs = {mode: _replaying(program, latents) for mode, program in engine.programs.items()}
    return keeping_steps(engine, programs).run(requests)


def _replaying(program: Program, latents: Mapping[str, tuple[Tensor, ...]]) -> Program:
    def run(request: Request) -> Generator[Operation, Any, Sample]:
        running, result = program(request), None
        while True:
            try:
                operation = running.send(result)
            except StopIteration as end:
                return end.value
            if isinstance(operation, Draw):
                operation = replace(operation, replayed=latents[request.id])
            result = yield operation

    return run


def _compare_batch(
    plain: Sequence[Sample], fast: Sequence[Sample], forced: Sequence[Sample], score: Score | None
) -> Iterator[Compared]:
    scores: Sequence[tuple[float, float] | None] = [None] * len(plain)
    if score is not None:
        texts = [_prompt_text(sample.request) for sample in plain]
        scores = list(zip(*(score([s.image for s in way], texts) for way in (plain, fast)), strict=True))
    for one, other, replayed, own in zip(plain, fast, forced, scores, strict=True):
        yield Compared(
            one.request.id,
            psnr(one.image, other.image),
            _relative_error(other.trajectory.latent_LC, one.trajectory.latent_LC),
            tuple(velocity_errors(one, replayed)),
            one.trajectory.text_turns == other.trajectory.text_turns,
            own,
        )


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures, `10 log10(255^2 / mean square)` dB, at most 100."""
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    error = float(np.mean(difference**2))
    return min(BEST_PSNR, 10 * math.log10(255**2 / error)) if error else BEST_PSNR


def velocity_errors(plain: Sample, forced: Sample) -> Iterator[float]:
    """`|v' - v| / |v|` at every step, v' being that of the run that was forced onto the plain one's latents.

    Of a step `x_next = a x + b v` without noise, so `v' - v` is `(x_next' - x_next) / b`.
    """
    settings = plain.request.settings
    steps = Schedule.build(settings.num_timesteps, settings.timestep_shift).steps
    before, after, other = plain.trajectory.steps, plain.trajectory.steps[1:], forced.trajectory.steps[1:]
    for step, x_LC, next_LC, other_LC in zip(steps, before, after, other, strict=False):
        moved = (next_LC.double() - step.a * x_LC.double()).norm()
        yield float((other_LC.double() - next_LC.double()).norm() / moved)


def _relative_error(value_LC: Tensor, truth_LC: Tensor) -> float:
    return float((value_LC.double() - truth_LC.double()).norm() / truth_LC.double().norm())


def _prompt_text(request: Request) -> str:
    return " ".join(part.text for part in request.prompt.parts if isinstance(part, TextPart))


def summarise(compared: Sequence[Compared]) -> dict[str, Any]:
    """Means and the worst over pictures; see `compare`."""
    worst = min(compared, key=lambda one: one.psnr)
    latent = [one.latent_error for one in compared]
    velocity = np.asarray([one.velocity_errors for one in compared])
    summary: dict[str, Any] = {
        "pictures": len(compared),
        "psnr": {
            "mean": round(float(np.mean([one.psnr for one in compared])), 2),
            "worst": round(worst.psnr, 2),
            "worst_id": worst.id,
        },
        "latent_error": {"mean": float(np.mean(latent)), "worst": max(latent)},
        "velocity_error": {
            "mean": float(velocity.mean()),
            "worst": float(velocity.max()),
            "by_step": velocity.mean(0).tolist(),
        },
        "other_texts": sum(not one.same_text for one in compared),
    }
    if compared[0].scores is not None:
        plain, fast = np.mean([one.scores for one in compared], axis=0)
        summary["score"] = {"plain": float(plain), "fast": float(fast)}
    return summary | {"by_picture": [vars(one) for one in compared]}
