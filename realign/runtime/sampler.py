"""From noise to latents: every job's branches in one packed forward per step.

Jobs of different prompts, sizes, schedules and guidance run together; a sample outside its guidance interval
drops its extra branches, and one whose schedule has ended drops out. Contexts are padded when the set of
running branches changes, not every step.

J running jobs, L their latent tokens, C latent channels, R rows (one branch of one job each), E model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.model.mot import Route
from realign.runtime.attention import PaddedAttention
from realign.runtime.context import embed_markers, latent_position_ids
from realign.runtime.guidance import Branch
from realign.runtime.noise import NoiseKey, normals, stack_keys
from realign.runtime.schedule import Schedule, stack_steps
from realign.runtime.settings import GuidanceSettings
from realign_kernels import Guidance, NoiseKeys, guided_flow_step
from realign_kernels.arguments import RENORMS

OnStep = Callable[[int, list[Tensor | None]], None]


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
    """

    branches: tuple[Branch, ...]
    height: int
    width: int
    schedule: Schedule
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    key: NoiseKey = field(default_factory=lambda: NoiseKey(0, ""))
    noise_LC: Tensor | None = None

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

    def running_kinds(self, step: int) -> tuple[str, ...]:
        """The branches that a step needs."""
        return ("conditional", *(kind for kind in ("text", "image") if self.scale(kind, step) > 1))


@torch.no_grad()
def denoise(model: Bagel, jobs: Sequence[DenoiseJob], on_step: OnStep | None = None) -> list[Tensor]:
    """Run every job to its end.

    Args:
        on_step: called before the first step with step 0, and after step i with i + 1; gets the latents in
            the order of `jobs`, None for those that had ended before.

    Returns: for each job its final latents, float32 [tokens, C].
    """
    if not jobs:
        return []
    order = sorted(range(len(jobs)), key=lambda index: -jobs[index].schedule.num_steps)
    ordered = [jobs[index] for index in order]
    latents = build_noise(model, ordered)
    observe = _observer(on_step, order)
    observe(0, latents)
    phase = None
    for step in range(ordered[0].schedule.num_steps):
        running = [job for job in ordered if step < job.schedule.num_steps]
        kinds = [job.running_kinds(step) for job in running]
        if phase is None or phase.kinds != kinds:
            phase = None  # frees the padded contexts before the next ones are built
            phase = _Phase(model, running, kinds)
        latents[: len(running)] = phase.step(step, latents[: len(running)])
        observe(step + 1, latents[: len(running)])
    return [latents[order.index(index)] for index in range(len(jobs))]


def build_noise(model: Bagel, jobs: Sequence[DenoiseJob]) -> list[Tensor]:
    """The initial latents of each job, float32 on the model's device."""
    channels = model.config.latent_dim
    lengths = [num_latent_tokens(model, job.height, job.width) for job in jobs]
    drawn = normals([job.key for job in jobs], lengths, channels, model.device)
    return [
        noise_LC if job.noise_LC is None else job.noise_LC.to(model.device, torch.float32)
        for job, noise_LC in zip(jobs, drawn, strict=True)
    ]


def num_latent_tokens(model: Bagel, height: int, width: int) -> int:
    stride = model.config.latent_stride
    return (height // stride) * (width // stride)


class _Phase:
    """Steps over which the same branches run: where every token goes, and the padded contexts."""

    def __init__(self, model: Bagel, jobs: Sequence[DenoiseJob], kinds: Sequence[tuple[str, ...]]) -> None:
        self.model, self.jobs, self.kinds = model, jobs, kinds
        self.sizes = [num_latent_tokens(model, job.height, job.width) for job in jobs]
        self.start_1E, self.end_1E = embed_markers(model)
        self.place_L = torch.cat([latent_position_ids(model, job.height, job.width) for job in jobs])
        self._lay_out_rows()
        offsets = [0, *torch.tensor(self.sizes).cumsum(0).tolist()]
        self.cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=model.device)
        modes = {job.guidance.renorm for job in jobs}
        codes = [RENORMS.index(job.guidance.renorm) for job in jobs]
        self.renorm = modes.pop() if len(modes) == 1 else torch.tensor(codes).int().to(model.device)
        self.renorm_min_J = self._per_job([job.guidance.renorm_min for job in jobs])

    def step(self, step: int, latents: Sequence[Tensor]) -> list[Tensor]:
        """One step of every job: three velocities, guidance, the sampler's update."""
        sample_LC = torch.cat(list(latents))
        numbers = [job.schedule.steps[step] for job in self.jobs]
        velocities = self._velocities(sample_LC, [number.t for number in numbers])
        guidance = Guidance(
            self._per_job([job.scale("text", step) for job in self.jobs]),
            self._per_job([job.scale("image", step) for job in self.jobs]),
            self.renorm,
            self.renorm_min_J,
        )
        noise = self._noise_keys(step)
        coefficients = stack_steps(numbers, self.model.device)
        next_LC = guided_flow_step(sample_LC, velocities, self.cu_seqlens, guidance, coefficients, noise)
        return list(next_LC.split(self.sizes))

    def _velocities(self, sample_LC: Tensor, times: Sequence[float]) -> list[Tensor | None]:
        """Conditional, text- and image-unconditional velocities [L, C]; None for a kind that no job runs.

        Jobs that do not run a kind have their conditional velocity there, which guidance does not read.
        """
        embedded_LE = self.model.embed_latent(sample_LC, self._token_times(times), self.place_L)
        source = torch.cat((self.start_1E, self.end_1E, embedded_LE.to(self.start_1E.dtype)))
        hidden = self.model.decoder(source[self.source_index], self.position, self.route, self.attention)
        velocity = self.model.velocity(hidden[self.route.gen_index_L])
        return [None if index_L is None else velocity[index_L] for index_L in self.velocity_index]

    def _token_times(self, times: Sequence[float]) -> Tensor:
        """One time for all, or one per token."""
        if len(set(times)) == 1:
            return self._per_job(times[:1])
        repeats_J = torch.tensor(self.sizes, device=self.model.device)
        return self._per_job(times).repeat_interleave(repeats_J)

    def _noise_keys(self, step: int) -> NoiseKeys | None:
        """The noise of a stochastic step, by name; None where the step is deterministic for all."""
        if not any(job.schedule.steps[step].std for job in self.jobs):
            return None
        keys = [replace(job.key, stream="sde", step=step) for job in self.jobs]
        return stack_keys(keys, self.model.device)

    def _per_job(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=self.model.device)

    def _lay_out_rows(self) -> None:
        """Rows in the order of jobs: [start_of_image, latents, end_of_image], all at the next position."""
        device = self.model.device
        sources, positions, contexts, lengths = [], [], [], []
        found: dict[tuple[int, str], Tensor] = {}
        num_latents, start = 0, 2
        for number, (job, kinds, size) in enumerate(zip(self.jobs, self.kinds, self.sizes, strict=True)):
            for kind in kinds:
                context = job.find_branch(kind).context
                sources.append(torch.tensor([0, *range(start, start + size), 1]))
                positions.append(torch.full((size + 2,), context.next_position))
                contexts.append(context)
                lengths.append(size + 2)
                found[number, kind] = torch.arange(num_latents, num_latents + size)
                num_latents += size
            start += size
        self.source_index = torch.cat(sources).to(device)
        self.position = torch.cat(positions).to(device)
        self.route = Route.from_mask(self.source_index >= 2)
        self.attention = PaddedAttention(self.model, contexts, lengths, [False] * len(lengths))
        self.velocity_index = [self._velocity_index(found, kind) for kind in ("conditional", "text", "image")]

    def _velocity_index(self, found: dict[tuple[int, str], Tensor], kind: str) -> Tensor | None:
        """Where the velocity of each of the L tokens lies among all rows' latent tokens."""
        if not any(kind in kinds for kinds in self.kinds):
            return None
        parts = [found.get((number, kind), found[number, "conditional"]) for number in range(len(self.jobs))]
        return torch.cat(parts).to(self.model.device)


def _observer(on_step: OnStep | None, order: Sequence[int]) -> OnStep:
    """Calls `on_step` with the latents back in the order of the jobs."""

    def observe(step: int, latents: list[Tensor]) -> None:
        if on_step is not None:
            by_job = dict(zip(order, latents, strict=False))
            on_step(step, [by_job.get(index) for index in range(len(order))])

    return observe
