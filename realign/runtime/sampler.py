"""From noise to latents: every job's branches in one packed forward per step.

Jobs of different prompts, sizes, schedules and guidance run together; a sample outside its guidance interval
drops its extra branches, and one whose schedule has ended drops out. Tokens and contexts are laid out when
the set of running branches changes, not every step; a step waits for nothing on the host.

J running jobs, L their latent tokens, C latent channels, R rows (one branch of one job each), E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate

import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.model.mot import Attend, Route
from realign.runtime.attention import Backend, ContextAttention, order_rows
from realign.runtime.context import embed_markers, latent_position_ids
from realign.runtime.forecast import StepNeeds, StepPlan, VelocityHistory, plan_steps
from realign.runtime.graphs import MAX_GRAPH_TOKENS, CapturedStep
from realign.runtime.guidance import KINDS, Branch
from realign.runtime.kv import check_current
from realign.runtime.noise import NoiseKey, normals, stack_keys
from realign.runtime.recording import NoisyStep
from realign.runtime.schedule import Schedule
from realign.runtime.settings import CachingSettings, GuidanceSettings
from realign_kernels import (
    Guidance,
    LogProbCoefficients,
    NoiseKeys,
    StepCoefficients,
    guided_flow_step,
    guided_velocity,
)
from realign_kernels.arguments import RENORMS

OnStep = Callable[[int, list[Tensor | None]], None]
OnNoisyStep = Callable[[int, NoisyStep], None]


@dataclass(frozen=True, eq=False)
class DenoiseJob:
    """One picture to denoise.

    Attributes:
        branches: one "conditional", at most one "text" and one "image".
        height, width: pixels, multiples of the latent stride.
        schedule: times and steps.
        guidance: interval and renorm; the scales are the branches'.
        key: names the initial noise (stream "initial").
        noise_LC: initial noise instead, float32.
        caching: which steps are computed; the others are forecast.
        replayed: the latents before each step, float32 [tokens, C], instead of what the step before gave.
    """

    branches: tuple[Branch, ...]
    height: int
    width: int
    schedule: Schedule
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    key: NoiseKey = field(default_factory=lambda: NoiseKey(0, ""))
    noise_LC: Tensor | None = None
    caching: CachingSettings = field(default_factory=CachingSettings)
    replayed: Sequence[Tensor] = ()

    def find_branch(self, kind: str) -> Branch | None:
        return next((branch for branch in self.branches if branch.kind == kind), None)

    @cached_property
    def is_guided(self) -> tuple[bool, ...]:
        """For each step whether it is guided: in the interval, and text guidance is on."""
        text = self.find_branch("text")
        if text is None or text.scale <= 1:
            return (False,) * self.schedule.num_steps
        return self.schedule.guided_steps(self.guidance.interval)

    def scale(self, kind: str, step: int) -> float:
        """The scale of a branch at a step: 1 where it does not act."""
        branch = self.find_branch(kind)
        return max(1.0, branch.scale) if branch is not None and self.is_guided[step] else 1.0

    @cached_property
    def numbers(self) -> list[tuple[float, ...]]:
        """Of each step what it is computed from: time, scale of text and of image guidance, a, b, std,
        weight and constant of the log-prob."""
        return [
            (
                step.t,
                *(self.scale(kind, index) for kind in ("text", "image")),
                *(step.a, step.b, step.std, step.logprob_weight, step.logprob_constant),
            )
            for index, step in enumerate(self.schedule.steps)
        ]

    def running_kinds(self, step: int) -> tuple[str, ...]:
        """The branches whose velocities a step needs."""
        return ("conditional", *(kind for kind in ("text", "image") if self.scale(kind, step) > 1))

    @cached_property
    def plans(self) -> tuple[StepPlan, ...]:
        """For each step which of them run, and what stands in for the others."""
        steps = enumerate(self.schedule.steps)
        needs = [StepNeeds(step.t, self.running_kinds(index), step.std > 0) for index, step in steps]
        return plan_steps(needs, self.caching)


@torch.no_grad()
def denoise(
    model: Bagel,
    jobs: Sequence[DenoiseJob],
    on_step: OnStep | None = None,
    backend: Backend | None = None,
    on_noisy_step: OnNoisyStep | None = None,
) -> list[Tensor]:
    """Run every job to its end.

    Args:
        on_step: called before the first step with step 0, and after step i with i + 1; gets the latents in
            the order of `jobs`, None for those that had ended before.
        backend: of attention.
        on_noisy_step: called after each stochastic step of a job, with the job's number among `jobs`.

    Returns: for each job its final latents, float32 [tokens, C].
    """
    if not jobs:
        return []
    check_current((branch.context for job in jobs for branch in job.branches), model)
    order = sorted(range(len(jobs)), key=lambda index: -jobs[index].schedule.num_steps)
    ordered = [jobs[index] for index in order]
    latents = build_noise(model, ordered)
    observe = _observer(on_step, order)
    observe(0, latents)
    table = _stack_numbers(ordered, model.device)
    histories = [VelocityHistory(job.plans) for job in ordered]
    phases: dict[bool, _Phase] = {}  # by whether rows run: what is laid out outlasts steps that run none
    for step in range(ordered[0].schedule.num_steps):
        running = [job for job in ordered if step < job.schedule.num_steps]
        plan = _Plan.of(running, step, on_noisy_step is not None)
        phase = phases.get(plan.has_rows)
        if phase is None or phase.plan != plan:
            phase = phases[plan.has_rows] = None  # frees what was laid out before the next is
            phase = phases[plan.has_rows] = _Phase(model, running, plan, backend)
        before = _before(step, running, latents)
        made = phase.step(step, table, before, histories)
        latents[: len(running)] = made.next_LC.split(phase.sizes)
        if plan.is_recorded:
            for number, noisy in phase.record(step, before, made):
                on_noisy_step(order[number], noisy)
        observe(step + 1, latents[: len(running)])
    return [latents[order.index(index)] for index in range(len(jobs))]


def _before(step: int, jobs: Sequence[DenoiseJob], latents: Sequence[Tensor]) -> list[Tensor]:
    """The latents that a step starts from, of each job: what the last one gave, or what is replayed."""
    pairs = zip(jobs, latents, strict=False)
    return [job.replayed[step].to(latent_LC) if job.replayed else latent_LC for job, latent_LC in pairs]


def build_noise(model: Bagel, jobs: Sequence[DenoiseJob]) -> list[Tensor]:
    """The initial latents of each job, float32 on the model's device."""
    channels = model.config.latent_dim
    lengths = [num_latent_tokens(model, job.height, job.width) for job in jobs]
    for job, length in zip(jobs, lengths, strict=True):
        _check_given(job, (length, channels))
    drawn = normals([job.key for job in jobs], lengths, channels, model.device)
    return [
        noise_LC if job.noise_LC is None else job.noise_LC.to(model.device, torch.float32)
        for job, noise_LC in zip(jobs, drawn, strict=True)
    ]


def _check_given(job: DenoiseJob, shape: tuple[int, int]) -> None:
    """Raises: ValueError if given latents are not of the picture's tokens, or not one for each step."""
    given = {"noise_LC": (job.noise_LC,), "replayed": job.replayed}
    for name, latents in given.items():
        wrong = next((one for one in latents if one is not None and tuple(one.shape) != shape), None)
        if wrong is not None:
            what = f"{name} has shape {list(wrong.shape)}: must be {list(shape)}"
            raise ValueError(f"{what}, a picture of {job.width}x{job.height}")
    if job.replayed and len(job.replayed) < job.schedule.num_steps:
        raise ValueError(
            f"replayed has {len(job.replayed)} latents: must be {job.schedule.num_steps}, one a step"
        )


def num_latent_tokens(model: Bagel, height: int, width: int) -> int:
    stride = model.config.latent_stride
    return (height // stride) * (width // stride)


NUM_NUMBERS = 8  # of `DenoiseJob.numbers`


def _stack_numbers(jobs: Sequence[DenoiseJob], device: torch.device) -> Tensor:
    """The numbers of all steps, float32 [steps, NUM_NUMBERS, J]; zeros for a job that has ended."""
    numbers = torch.zeros(jobs[0].schedule.num_steps, NUM_NUMBERS, len(jobs))
    for index, job in enumerate(jobs):
        numbers[: len(job.numbers), :, index] = torch.tensor(job.numbers)
    return numbers.to(device)


def stack_guidance(settings: Sequence[GuidanceSettings], text_J: Tensor, image_J: Tensor) -> Guidance:
    """The guidance of samples as the ops take it; the scales are those of the step."""
    codes = [RENORMS.index(own.renorm) for own in settings]
    is_common = len(set(codes)) == 1
    renorm = settings[0].renorm if is_common else torch.tensor(codes).int().to(text_J.device)
    renorm_min_J = torch.tensor([own.renorm_min for own in settings], dtype=torch.float32)
    return Guidance(text_J, image_J, renorm, renorm_min_J.to(text_J.device))


@dataclass(frozen=True)
class _Plan:
    """What a step consists of: the branches of each job that run, whether any job's step is noisy, whether
    any job has steps that are forecast, and whether noisy steps are recorded.
    """

    kinds: tuple[tuple[str, ...], ...]
    is_noisy: bool
    is_cached: bool
    is_recorded: bool

    @classmethod
    def of(cls, jobs: Sequence[DenoiseJob], step: int, has_recorder: bool) -> _Plan:
        is_noisy = any(job.schedule.steps[step].std for job in jobs)
        is_cached = any(job.caching.is_on for job in jobs)
        kinds = tuple(job.plans[step].computed for job in jobs)
        return cls(kinds, is_noisy, is_cached, is_noisy and has_recorder)

    @property
    def has_rows(self) -> bool:
        return any(self.kinds)


@dataclass(frozen=True, eq=False)
class _Made:
    """What a step gives: the next latents; where it is recorded, log-probs and the guided velocity too."""

    next_LC: Tensor
    logprob_J: Tensor | None = None
    velocity_LC: Tensor | None = None

    def clone(self) -> _Made:
        return _Made(*(None if part is None else part.clone() for part in vars(self).values()))


class _Phase:
    """Steps of one plan: every tensor that they read and write lies where it is."""

    def __init__(
        self, model: Bagel, jobs: Sequence[DenoiseJob], plan: _Plan, backend: Backend | None
    ) -> None:
        self.jobs, self.plan = jobs, plan
        device = model.device
        self.sizes = [num_latent_tokens(model, job.height, job.width) for job in jobs]
        self.rows = None
        if plan.has_rows:
            has_one_time = len({job.schedule.times for job in jobs}) == 1
            attend = partial(ContextAttention, backend=backend)
            self.rows = BranchRows(model, jobs, plan.kinds, has_one_time, attend)
        self.cu_seqlens = torch.tensor([0, *accumulate(self.sizes)], dtype=torch.int32, device=device)
        self.numbers_FJ = torch.empty(NUM_NUMBERS, len(jobs), device=device)
        _, text_J, image_J, a_J, b_J, std_J, *logprob = self.numbers_FJ
        self.guidance = stack_guidance([job.guidance for job in jobs], text_J, image_J)
        self.coefficients = StepCoefficients(a_J, b_J, std_J if plan.is_noisy else None)
        self.noise = self._name_noise(device) if plan.is_noisy else None
        self.logprob = LogProbCoefficients(*logprob) if plan.is_recorded else None
        self.sample_LC = torch.empty(sum(self.sizes), model.config.latent_dim, device=device)
        is_small = self.rows is not None and self.rows.num_tokens <= MAX_GRAPH_TOKENS
        self.run = CapturedStep(self._compute if plan.is_cached else self._run, device, is_small)

    def step(
        self, step: int, table: Tensor, latents: Sequence[Tensor], histories: Sequence[VelocityHistory]
    ) -> _Made:
        """One step of every job: three velocities, guidance, the sampler's update."""
        torch.cat(list(latents), out=self.sample_LC)
        self.numbers_FJ.copy_(table[step, :, : len(self.jobs)])
        if self.noise is not None:
            self.noise.step_B.fill_(step)
        if self.plan.is_cached:
            return self._update(self._recall(step, histories))
        made = self.run()
        return made.clone() if self.run.is_captured else made  # the next replay writes there again

    def record(self, step: int, before: Sequence[Tensor], made: _Made) -> Iterator[tuple[int, NoisyStep]]:
        """The number of each job whose step was noisy, and what is kept of it."""
        logprobs = made.logprob_J.tolist()
        parts = zip(before, *(t.split(self.sizes) for t in (made.next_LC, made.velocity_LC)), strict=True)
        for number, (job, tensors) in enumerate(zip(self.jobs, parts, strict=True)):
            if job.schedule.steps[step].has_logprob:
                kept = (tensor.to("cpu", torch.float32, copy=True) for tensor in tensors)
                yield number, NoisyStep(step, *kept, logprobs[number])

    def _run(self) -> _Made:
        return self._update(self.rows.gather(self._compute()))

    def _compute(self) -> Tensor:
        return self.rows.compute(self.sample_LC, self.numbers_FJ[0])

    def _update(self, velocities: Sequence[Tensor | None]) -> _Made:
        given = (self.sample_LC, velocities, self.cu_seqlens, self.guidance, self.coefficients, self.noise)
        if self.logprob is None:
            return _Made(guided_flow_step(*given))
        velocity_LC = guided_velocity(velocities, self.cu_seqlens, self.guidance, torch.float32)
        return _Made(*guided_flow_step(*given, self.logprob), velocity_LC)

    def _recall(self, step: int, histories: Sequence[VelocityHistory]) -> list[Tensor | None]:
        """Velocities as of `BranchRows.gather`, of which some may be forecast."""
        computed: list[dict[str, Tensor]] = [{} for _ in self.jobs]
        if self.rows is not None:
            velocity = self.run()
            computed = self.rows.split(velocity.clone() if self.run.is_captured else velocity)
        pairs = zip(histories, computed, strict=False)
        complete = [history.complete(step, own) for history, own in pairs]
        present = {kind for own in complete for kind in own}
        return [
            torch.cat([own.get(kind, own["conditional"]) for own in complete]) if kind in present else None
            for kind in KINDS
        ]

    def _name_noise(self, device: torch.device) -> NoiseKeys:
        return stack_keys([replace(job.key, stream="sde") for job in self.jobs], device)


class BranchRows:
    """The branches that run, as rows of one packed forward: where every token goes.

    A row is [start_of_image, latents, end_of_image], all at its context's next position. Rows that share what
    they have read lie together.

    Args:
        kinds: the branches of each job that run.
        has_one_time: whether all jobs are at the same time.
        build_attention: `ContextAttention`, or what does the same.
    """

    def __init__(
        self,
        model: Bagel,
        jobs: Sequence[DenoiseJob],
        kinds: Sequence[tuple[str, ...]],
        has_one_time: bool,
        build_attention: Callable[..., Attend] = ContextAttention,
    ) -> None:
        self.model = model
        self.sizes = [num_latent_tokens(model, job.height, job.width) for job in jobs]
        self.start_1E, self.end_1E = embed_markers(model)
        self.place_L = torch.cat([latent_position_ids(model, job.height, job.width) for job in jobs])
        self.has_one_time = has_one_time
        job_index = [torch.full((size,), number) for number, size in enumerate(self.sizes)]
        self.job_L = torch.cat(job_index).to(model.device)
        rows = [(number, kind) for number, own in enumerate(kinds) for kind in own]
        contexts = [jobs[number].find_branch(kind).context for number, kind in rows]
        lengths = [self.sizes[number] + 2 for number, _ in rows]
        order = order_rows(contexts, lengths)
        self.rows, contexts, lengths = ([values[i] for i in order] for values in (rows, contexts, lengths))
        self.num_tokens = sum(lengths)
        self._lay_out([context.next_position for context in contexts])
        self.attention = build_attention(model, contexts, lengths, [False] * len(lengths))

    def compute(self, sample_LC: Tensor, time_J: Tensor) -> Tensor:
        """The velocities of all rows, one after the other."""
        time_L = time_J[:1] if self.has_one_time else time_J[self.job_L]
        embedded_LE = self.model.embed_latent(sample_LC, time_L, self.place_L)
        source = torch.cat((self.start_1E, self.end_1E, embedded_LE.to(self.start_1E.dtype)))
        hidden = self.model.decoder(source[self.source_index], self.position, self.route, self.attention)
        return self.model.velocity(hidden[self.route.gen_index_L])

    def gather(self, velocity: Tensor) -> list[Tensor | None]:
        """Conditional, text- and image-unconditional velocities [L, C]; None for a kind that no job runs.

        Jobs that do not run a kind have their conditional velocity there, which guidance does not read.
        """
        return [None if index_L is None else velocity[index_L] for index_L in self.velocity_index]

    def split(self, velocity: Tensor) -> list[dict[str, Tensor]]:
        """For each job its velocities by kind, those that ran."""
        parts = velocity.split([self.sizes[number] for number, _ in self.rows])
        found: list[dict[str, Tensor]] = [{} for _ in self.sizes]
        for (number, kind), part_LC in zip(self.rows, parts, strict=True):
            found[number][kind] = part_LC
        return found

    def _lay_out(self, next_positions: Sequence[int]) -> None:
        starts = [2, *(2 + end for end in accumulate(self.sizes))]
        sources, positions = [], []
        for (number, _), position in zip(self.rows, next_positions, strict=True):
            size = self.sizes[number]
            sources.append(torch.tensor([0, *range(starts[number], starts[number] + size), 1]))
            positions.append(torch.full((size + 2,), position))
        self.source_index = torch.cat(sources).to(self.model.device)
        self.position = torch.cat(positions).to(self.model.device)
        self.route = Route.from_mask(self.source_index >= 2)

    @cached_property
    def velocity_index(self) -> list[Tensor | None]:
        """For each kind, where the velocity of each of the L tokens lies among all rows' latent tokens."""
        ends = accumulate(self.sizes[number] for number, _ in self.rows)
        found = {
            row: torch.arange(end - self.sizes[row[0]], end) for row, end in zip(self.rows, ends, strict=True)
        }
        return [self._find_velocity(found, kind) for kind in KINDS]

    def _find_velocity(self, found: dict[tuple[int, str], Tensor], kind: str) -> Tensor | None:
        if not any(own == kind for _, own in found):
            return None
        jobs = range(len(self.sizes))
        parts = [found.get((number, kind), found[number, "conditional"]) for number in jobs]
        return torch.cat(parts).to(self.model.device)


def _observer(on_step: OnStep | None, order: Sequence[int]) -> OnStep:
    """Calls `on_step` with the latents back in the order of the jobs."""

    def observe(step: int, latents: list[Tensor]) -> None:
        if on_step is not None:
            by_job = dict(zip(order, latents, strict=False))
            on_step(step, [by_job.get(index) for index in range(len(order))])

    return observe
