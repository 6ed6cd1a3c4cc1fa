"""The packed loop against the same loop written out plainly, one sample and one branch at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from realign.model.mot import Route
from realign.runtime import sampler
from realign.runtime.context import (
    Context,
    build_text_block,
    build_vae_blocks,
    embed_markers,
    extend,
    latent_position_ids,
)
from realign.runtime.guidance import Branch
from realign.runtime.noise import NoiseKey, normal
from realign.runtime.sampler import DenoiseJob, build_noise, denoise
from realign.runtime.schedule import Schedule
from realign.runtime.settings import CachingSettings, GuidanceSettings

pytestmark = pytest.mark.usefixtures("poison_fresh_memory")


def plain_velocity(model, context, latent_LC, t, size):
    """One branch of one sample: attention written out over the whole context."""
    start_1E, end_1E = embed_markers(model)
    place_L = latent_position_ids(model, *size)
    tokens_LE = model.embed_latent(latent_LC, torch.tensor([t]), place_L)
    hidden_LE = torch.cat((start_1E, tokens_LE, end_1E))
    is_gen = torch.ones(len(hidden_LE), dtype=torch.bool)
    is_gen[0] = is_gen[-1] = False

    def attend(layer, query_LHD, key_LKD, value_LKD):
        if context.length:
            key_LKD = torch.cat((context.key(layer), key_LKD))
            value_LKD = torch.cat((context.value(layer), value_LKD))
        repeats = query_LHD.shape[1] // key_LKD.shape[1]
        key_LHD, value_LHD = (t.repeat_interleave(repeats, dim=1) for t in (key_LKD, value_LKD))
        scores_HLS = torch.einsum("lhd,shd->hls", query_LHD, key_LHD) / query_LHD.shape[-1] ** 0.5
        return torch.einsum("hls,shd->lhd", scores_HLS.softmax(-1), value_LHD)

    position_L = torch.full((len(hidden_LE),), context.next_position)
    hidden_LE = model.decoder(hidden_LE, position_L, Route.from_mask(is_gen), attend)
    return model.velocity(hidden_LE[1:-1])


def plain_velocities(model, job, index, latent_LC, found):
    """Velocities by kind at a step, those that are forecast from what was `found` at earlier ones."""
    size, step, plan = (job.height, job.width), job.schedule.steps[index], job.plans[index]
    own = {}
    for kind in plan.computed:
        context = job.find_branch(kind).context
        found[kind, index] = own[kind] = plain_velocity(model, context, latent_LC, step.t, size)
    for kind, weights in plan.forecast.items():
        own[kind] = sum(weight * found[source] for source, weight in weights.items())
    return own


@torch.no_grad()
def plain_denoise(model, job):
    """BAGEL's loop for one sample, with global renorm."""
    found = {}
    latent_LC = normal(job.key, (job.height // 8 * (job.width // 8), model.config.latent_dim))
    text, image = job.find_branch("text"), job.find_branch("image")
    for index, step in enumerate(job.schedule.steps):
        velocities = plain_velocities(model, job, index, latent_LC, found)
        v = velocities["conditional"]
        low, high = job.guidance.interval
        if low < step.t <= high and text.scale > 1:
            guided = velocities["text"] + text.scale * (v - velocities["text"])
            if image.scale > 1:
                guided = velocities["image"] + image.scale * (guided - velocities["image"])
            v = guided * (v.norm() / (guided.norm() + 1e-8)).clamp(job.guidance.renorm_min, 1.0)
        latent_LC = step.a * latent_LC + step.b * v
        if step.std:
            key = replace(job.key, stream="sde", step=index)
            latent_LC = latent_LC + step.std * normal(key, latent_LC.shape)
    return latent_LC


@pytest.fixture
def contexts(model):
    empty = Context()
    pixels = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (picture,) = build_vae_blocks(model, [pixels])
    text = build_text_block(model, "put it on the table")
    seen, read = extend(model, [empty, empty], [picture, text])
    (both,) = extend(model, [seen], [text])
    return both, seen, read, empty


@pytest.fixture
def jobs(contexts):
    both, seen, read, empty = contexts
    schedules = [
        Schedule.build(6, 3.0),
        Schedule.build(3, 1.0),
        Schedule.build(9, 4.0),
        Schedule.build(6, 3.0),
    ]
    guidances = [
        GuidanceSettings(interval=(0.4, 1.0)),
        GuidanceSettings(interval=(0.0, 1.0), renorm_min=0.95),
        GuidanceSettings(interval=(0.4, 0.9)),
        GuidanceSettings(interval=(0.0, 0.0)),
    ]
    branches = [
        (Branch(both), Branch(seen, 4.0, "text"), Branch(read, 2.0, "image")),
        (Branch(read), Branch(empty, 3.0, "text"), Branch(read, 1.0, "image")),
        (Branch(both), Branch(seen, 6.0, "text"), Branch(empty, 1.5, "image")),
        (Branch(both), Branch(seen, 1.0, "text"), Branch(read, 2.0, "image")),
    ]
    sizes = [(16, 24), (32, 16), (8, 8), (16, 24)]
    return [
        DenoiseJob(*given[:1], *size, *given[1:], NoiseKey(1, str(number)))
        for number, (size, *given) in enumerate(zip(sizes, branches, schedules, guidances, strict=True))
    ]


def test_a_mixed_batch_is_each_sample_alone(model, jobs):
    for job, latent_LC in zip(jobs, denoise(model, jobs), strict=True):
        torch.testing.assert_close(latent_LC, plain_denoise(model, job), rtol=1e-5, atol=1e-5)


def test_a_job_has_its_own_bits_on_a_cpu(model, jobs):
    """Padding, products and sums are a function of the job alone: not nearly equal, equal."""
    together, reversed_ = denoise(model, jobs), denoise(model, jobs[::-1])[::-1]
    for job, one, other in zip(jobs, together, reversed_, strict=True):
        (alone,) = denoise(model, [job])
        assert torch.equal(one, alone)
        assert torch.equal(other, alone)


@pytest.mark.parametrize("multiple", [1, 16, 512])
def test_padding_moves_only_the_last_bits(model, jobs, monkeypatch, multiple):
    expected = denoise(model, jobs)
    monkeypatch.setattr("realign.runtime.attention.rows.PAST_MULTIPLE", multiple)
    for ours, theirs in zip(denoise(model, jobs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_stochastic_steps_take_their_noise_from_the_key(model, jobs):
    def noisy(job):
        steps = tuple(replace(step, std=0.1 * step.t) for step in job.schedule.steps)
        return replace(job, schedule=replace(job.schedule, steps=steps))

    mixed = [noisy(jobs[0]), jobs[1], noisy(jobs[2])]
    for job, latent_LC in zip(mixed, denoise(model, mixed), strict=True):
        torch.testing.assert_close(latent_LC, plain_denoise(model, job), rtol=1e-5, atol=1e-5)


def test_given_noise_and_every_step_are_seen(model, jobs):
    given = torch.randn(6, model.config.latent_dim, generator=torch.Generator().manual_seed(3))
    mixed = [jobs[1], replace(jobs[0], noise_LC=given)]
    seen = []
    final = denoise(model, mixed, lambda step, latents: seen.append((step, latents)))
    assert [step for step, _ in seen] == list(range(6))
    assert torch.equal(seen[0][1][1], given)
    assert [latents[0] is None for _, latents in seen] == [False, False, False, True, True, True]
    assert torch.equal(seen[2][1][0], final[0])
    assert torch.equal(seen[5][1][1], final[1])


def test_branches_run_only_where_they_act(jobs):
    kinds = [[job.running_kinds(step) for step in range(job.schedule.num_steps)] for job in jobs]
    assert [len(step) for step in kinds[0]] == [3, 3, 3, 3, 3]
    assert kinds[1] == [("conditional", "text")] * 2
    assert [len(step) for step in kinds[2]] == [1, 1, 1, 3, 3, 3, 3, 1]
    assert kinds[3] == [("conditional",)] * 5  # image guidance acts only together with text guidance


@pytest.fixture
def cached(jobs):
    """Three jobs whose steps are computed and forecast at different times, and one without step caching."""
    settings = [
        CachingSettings(2, 1, 2),
        CachingSettings(2, 0, 1),
        CachingSettings(3, 2, 2, reuse_guidance_below=0.8),
    ]
    longer = [replace(job, schedule=Schedule.build(12, 3.0)) for job in jobs[:3]]
    pairs = zip(longer, settings, strict=True)
    return [*(replace(job, caching=caching) for job, caching in pairs), jobs[3]]


def test_steps_that_are_forecast_run_no_rows(model, cached, monkeypatch):
    seen = []
    compute = sampler.BranchRows.compute

    def watch(self, *arguments):
        seen.append(len(self.rows))
        return compute(self, *arguments)

    monkeypatch.setattr(sampler.BranchRows, "compute", watch)
    denoise(model, cached[:1])
    assert seen == [len(plan.computed) for plan in cached[0].plans if plan.computed]
    assert len(seen) < cached[0].schedule.num_steps


def test_forecast_and_computed_steps_in_one_batch(model, cached):
    together, reversed_ = denoise(model, cached), denoise(model, cached[::-1])[::-1]
    for job, one, other in zip(cached, together, reversed_, strict=True):
        torch.testing.assert_close(one, plain_denoise(model, job), rtol=1e-5, atol=1e-5)
        assert torch.equal(one, other)
        assert torch.equal(one, denoise(model, [job])[0])


def test_noisy_steps_among_forecast_ones(model, cached):
    steps = cached[0].schedule.steps
    noisy = tuple(replace(step, std=0.1) if index in (4, 5) else step for index, step in enumerate(steps))
    job = replace(cached[0], schedule=replace(cached[0].schedule, steps=noisy))
    assert job.plans[5].computed
    assert not all(plan.computed for plan in job.plans)
    torch.testing.assert_close(denoise(model, [job])[0], plain_denoise(model, job), rtol=1e-5, atol=1e-5)


def test_replayed_latents_are_where_each_step_begins(model, jobs):
    """A step of the replay is a step of the run; the last step's result is what counts."""
    states = []
    denoise(model, jobs[:1], lambda step, latents: states.append(latents[0]))
    moved = [state + 0.1 for state in states[:-1]]
    again = []
    denoise(model, [replace(jobs[0], replayed=states[:-1])], lambda step, latents: again.append(latents[0]))
    assert all(torch.equal(one, other) for one, other in zip(states, again, strict=True))
    last = denoise(model, [replace(jobs[0], replayed=[*states[:-2], moved[-1]])])
    assert not torch.allclose(last[0], states[-1], atol=1e-2)


def test_no_jobs_is_no_work(model):
    assert denoise(model, []) == []


def test_an_unknown_branch_is_refused():
    with pytest.raises(ValueError, match="branch kind is 'video'"):
        Branch(Context(), 2.0, "video")


def test_given_latents_must_fit_the_picture(model, jobs):
    job = jobs[0]
    length, channels = build_noise(model, [job])[0].shape
    short, whole = torch.zeros(length - 1, channels), torch.zeros(length, channels)
    with pytest.raises(
        ValueError, match=rf"noise_LC has shape .*: must be \[{length}, {channels}\], a picture"
    ):
        denoise(model, [replace(job, noise_LC=short), jobs[1]])
    with pytest.raises(ValueError, match="replayed has 1 latents: must be"):
        denoise(model, [replace(job, replayed=(whole,))])
