"""Takes recorded stochastic steps again, through the weights as they are now, with a gradient.

A replay is the sampler's own step: contexts are read by the runtime's reader, the branches of all entries are
rows of one packed forward with the runtime's layout and kernels, and the log-prob comes from the op that
belongs to the sampler's. So, with the rows that were sampled together, its bits are those of the rollout.

N entries (one recorded step of one sample each), L latent tokens of all, C channels, R requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from realign.runtime.attention import ContextAttention
from realign.runtime.attention.gradient import DifferentiableAttention
from realign.runtime.engine import Engine
from realign.runtime.guidance import Branch
from realign.runtime.operations import Draw, Read
from realign.runtime.reader import Reader
from realign.runtime.recording import NoisyStep
from realign.runtime.request import Request, Sample
from realign.runtime.sampler import BranchRows, DenoiseJob, stack_guidance
from realign.runtime.schedule import Step
from realign.runtime.stages import build_schedule
from realign_kernels import LogProbCoefficients, RatioBias, StepCoefficients, guided_velocity, sde_logprob

PACKINGS = ("rollout", "dense")
READ_TOKENS = {"cpu": 2**14, "cuda": 2**18}  # padded tokens of one forward that reads


@dataclass(frozen=True, eq=False)
class Entry:
    """One recorded step of one sample; `number` is the sample's among those of the iteration."""

    sample: Sample
    noisy: NoisyStep
    number: int = 0


@dataclass(frozen=True, eq=False)
class Replayed:
    """What entries are under the weights of now.

    Attributes:
        logprob_N: float32, differentiable.
        bias_N: GRPO-Guard's, differentiable.
        velocity_LC: guided velocities, float32, differentiable; `cu_seqlens` int32 [N + 1] their offsets.
        old_logprob_N: as recorded.
        steps: of the schedule.
    """

    logprob_N: Tensor
    bias_N: Tensor
    velocity_LC: Tensor
    cu_seqlens: Tensor
    old_logprob_N: Tensor
    steps: tuple[Step, ...]


def list_entries(samples: Sequence[Sample]) -> list[Entry]:
    """All recorded steps of samples."""
    pairs = ((number, sample) for number, sample in enumerate(samples))
    return [
        Entry(sample, noisy, n) for n, sample in pairs for noisy in sample.trajectory.recording.noisy_steps
    ]


def pack_entries(entries: Sequence[Entry], packing: str, size: int) -> list[list[Entry]]:
    """Entries as they go into forwards together.

    Args:
        packing: "rollout": those that were one step of one call of the sampler, in its order; "dense": `size`
            at a time, the steps of a sample next to each other.

    Raises: ValueError for another packing.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}: must be one of {', '.join(PACKINGS)}")
    if packing == "dense":
        return [list(entries[start : start + size]) for start in range(0, len(entries), size)]
    packs: dict[tuple[tuple[str, ...], int], list[Entry]] = {}
    for entry in entries:
        key = (entry.sample.trajectory.recording.company, entry.noisy.index)
        packs.setdefault(key, []).append(entry)
    return [sorted(pack, key=_find_row) for pack in packs.values()]


def _find_row(entry: Entry) -> tuple[int, int]:
    """The sampler has longer schedules first."""
    request = entry.sample.request
    company = entry.sample.trajectory.recording.company
    return -request.settings.num_timesteps, company.index(request.id)


def build_reader(engine: Engine, has_gradient: bool = False) -> Reader:
    """What reads as the engine does."""
    device, model = engine.model.device.type, engine.model
    return Reader(model, engine.prepare, READ_TOKENS[device], engine.backend, engine.run_tokens, has_gradient)


class Replayer:
    """Replays entries with an engine's model, programs and kernels.

    Args:
        through_contexts: a gradient flows through what was read, prompts and texts, as well: it is read anew,
            and what it takes is kept, for every forward.
    """

    def __init__(self, engine: Engine, through_contexts: bool = False) -> None:
        self.engine, self.model = engine, engine.model
        self.through_contexts = through_contexts
        self.reader = build_reader(engine, through_contexts)
        self.held: tuple[tuple[int, ...], list[tuple[Branch, ...]]] = ((), [])

    def replay(self, entries: Sequence[Entry]) -> Replayed:
        """The entries' log-probs, in one forward; with a gradient to the weights if that is enabled."""
        jobs = self._build_jobs(entries)
        device = self.model.device
        steps = tuple(job.schedule.steps[e.noisy.index] for job, e in zip(jobs, entries, strict=True))
        numbers = [job.numbers[entry.noisy.index] for job, entry in zip(jobs, entries, strict=True)]
        time_N, text_N, image_N, a_N, b_N, _, weight_N, constant_N = (
            torch.tensor(numbers).T.contiguous().to(device)
        )
        sample_LC, next_LC, old_LC = (
            torch.cat([getattr(entry.noisy, name) for entry in entries]).to(device)
            for name in ("sample_LC", "next_LC", "velocity_LC")
        )
        lengths = [len(entry.noisy.sample_LC) for entry in entries]
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        rows = self._lay_out(jobs, entries)
        guidance = stack_guidance([job.guidance for job in jobs], text_N, image_N)
        velocities = rows.gather(rows.compute(sample_LC, time_N))
        velocity_LC = guided_velocity(velocities, cu_seqlens, guidance, torch.float32)
        guard_weight_N = torch.tensor([1 / (2 * step.std**2) for step in steps], device=device)
        logprob_N, bias_N = sde_logprob(
            (sample_LC, next_LC),
            velocity_LC,
            cu_seqlens,
            StepCoefficients(a_N, b_N),
            LogProbCoefficients(weight_N, constant_N),
            RatioBias(old_LC, guard_weight_N),
        )
        recorded_N = torch.tensor([entry.noisy.logprob for entry in entries], device=device)
        return Replayed(logprob_N, bias_N, velocity_LC, cu_seqlens, recorded_N, steps)

    def forget(self) -> None:
        """Hold no contexts any more."""
        self.held = ((), [])

    def _lay_out(self, jobs: Sequence[DenoiseJob], entries: Sequence[Entry]) -> BranchRows:
        kinds = [job.running_kinds(entry.noisy.index) for job, entry in zip(jobs, entries, strict=True)]
        times = {(job.schedule.times, e.noisy.index) for job, e in zip(jobs, entries, strict=True)}
        attention = DifferentiableAttention if torch.is_grad_enabled() else ContextAttention
        attend = partial(attention, backend=self.engine.backend)
        return BranchRows(self.model, jobs, kinds, len(times) == 1, attend)

    def _build_jobs(self, entries: Sequence[Entry]) -> list[DenoiseJob]:
        by_sample = {id(entry.sample): entry.sample for entry in entries}
        branches = dict(zip(by_sample, self._rebuild(list(by_sample.values())), strict=True))
        return [_build_job(entry.sample, branches[id(entry.sample)]) for entry in entries]

    def _rebuild(self, samples: Sequence[Sample]) -> list[tuple[Branch, ...]]:
        """Each sample's branches, read with the weights of now; those of the last call are held, but for
        those with a gradient, which serve one backward pass.
        """
        requests = [replace(sample.request, turns=sample.trajectory.text_turns) for sample in samples]
        if self.through_contexts and torch.is_grad_enabled():
            self.forget()
            self.reader.forget_contexts()
            return read_branches(self.engine, self.reader, requests)
        key = (self.model.weights_version, *map(id, samples))
        if self.held[0] != key:
            self.forget()  # before more is held
            with torch.no_grad():
                self.held = (key, read_branches(self.engine, self.reader, requests))
        return self.held[1]


def read_branches(engine: Engine, reader: Reader, requests: Sequence[Request]) -> list[tuple[Branch, ...]]:
    """Run programs whose texts are given up to their picture: the branches that would guide it."""
    programs = [engine.programs[request.settings.reasoning](request) for request in requests]
    operations: list[Any] = [next(program) for program in programs]
    while waiting := [i for i, operation in enumerate(operations) if isinstance(operation, Read)]:
        contexts = iter(reader.read([reading for i in waiting for reading in operations[i].readings]))
        for i in waiting:
            operations[i] = programs[i].send([next(contexts) for _ in operations[i].readings])
    assert all(isinstance(operation, Draw) for operation in operations)
    return [operation.branches for operation in operations]


def _build_job(sample: Sample, branches: tuple[Branch, ...]) -> DenoiseJob:
    settings, (width, height) = sample.request.settings, sample.image.size
    schedule = build_schedule(settings.num_timesteps, settings.timestep_shift, settings.noise)
    return DenoiseJob(branches, height, width, schedule, settings.guidance)
