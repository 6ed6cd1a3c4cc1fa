"""Stochastic steps: asked for by a request's settings, and kept with their log-probs."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from realign.model.bagel import Bagel
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.noise import NoiseKey, normal
from realign.runtime.prepare import crop_picture
from realign.runtime.request import Prompt, Request, Sample
from realign.runtime.schedule import Schedule
from realign.runtime.settings import SDE_RULES, CachingSettings, GuidanceSettings, NoiseSettings, Settings
from realign.runtime.stream import Stream, StreamOptions

from .conftest import draw_picture

WINDOW = (1, 2)


def build_engine(model: Bagel, **options) -> Engine:
    return Engine(model, PROGRAMS, prepare=crop_picture, record=True, **options)


def build_request(number: int = 0, rule: str = "flow-grpo", **changes) -> Request:
    level = 0.7 if rule == "cps" else 1.3
    guidance = GuidanceSettings(3.0, 1.5, (0.0, 1.0))
    settings = Settings(32, 32, "none", 6, guidance=guidance, noise=NoiseSettings(rule, level, WINDOW))
    prompt = Prompt.build([draw_picture(1, 32, 48), "a mug"])
    return Request(f"request {number}", prompt, number, replace(settings, **changes))


def run(engine: Engine, *requests: Request, **options) -> list[Sample]:
    return engine.run(requests, StreamOptions(**options))


@pytest.mark.parametrize("rule", SDE_RULES)
def test_a_noisy_step_is_the_schedules(model: Bagel, rule: str) -> None:
    """`x_next = a x + b v + std noise`, with the request's own noise, and its log-prob."""
    (sample,) = run(build_engine(model, keep_steps=True), build_request(rule=rule))
    recording = sample.trajectory.recording
    assert [step.index for step in recording.noisy_steps] == [1, 2]
    level = sample.request.settings.noise.level
    schedule = Schedule.build(6, 3.0).with_noise(rule, level, (1, 3))
    for noisy in recording.noisy_steps:
        step = schedule.steps[noisy.index]
        key = NoiseKey(0, "request 0", 0, "sde", noisy.index)
        noise_LC = normal(key, noisy.next_LC.shape)
        mean_LC = step.a * noisy.sample_LC.double() + step.b * noisy.velocity_LC.double()
        torch.testing.assert_close(
            noisy.next_LC.double(), mean_LC + step.std * noise_LC, rtol=1e-5, atol=1e-5
        )
        error = (noisy.next_LC - mean_LC).square().mean()
        expected = step.logprob_constant - step.logprob_weight * float(error)
        assert noisy.logprob == pytest.approx(expected, rel=1e-4)
        steps = sample.trajectory.steps
        assert torch.equal(steps[noisy.index], noisy.sample_LC)
        assert torch.equal(steps[noisy.index + 1], noisy.next_LC)
        assert noisy.sample_LC.dtype == noisy.next_LC.dtype == noisy.velocity_LC.dtype == torch.float32


def test_recording_changes_nothing(model: Bagel) -> None:
    with_records = run(build_engine(model), build_request())[0]
    without = run(Engine(model, PROGRAMS, prepare=crop_picture), build_request())[0]
    assert without.trajectory.recording is None
    assert torch.equal(with_records.trajectory.latent_LC, without.trajectory.latent_LC)


def test_pictures_stay_on_the_device_and_are_those_of_an_engine_that_records_nothing(model: Bagel) -> None:
    requests = [build_request(0), build_request(1, height=16, width=48), build_request(2)]
    plain = run(Engine(model, PROGRAMS, prepare=crop_picture), *requests)
    for ours, theirs in zip(run(build_engine(model), *requests), plain, strict=True):
        assert (ours.picture.dtype, ours.picture.device) == (torch.uint8, model.device)
        assert ours.picture.is_contiguous()
        assert ours.picture.untyped_storage().nbytes() == ours.picture.nbytes, "nothing else is held with it"
        assert theirs.image is theirs.picture
        np.testing.assert_array_equal(ours.picture, theirs.image)
        assert ours.image.tobytes() == theirs.image.tobytes()
        assert ours.image is ours.image, "copied once"


def test_drawing_leaves_room_for_the_pictures_that_are_held(model: Bagel) -> None:
    stream = Stream(build_engine(model, memory_bytes=2**30), map(build_request, range(3)), StreamOptions())
    with closing(stream):
        held = [sample for _, sample in stream]
        for count in (3, 2):
            contexts = stream.kv_token * stream.reader.count_held()
            assert 2**30 - contexts - stream._find_room(stream.draw) == count * 32 * 32 * 3
            held.pop()


def test_without_noise_nothing_is_kept_and_the_path_is_the_odes(model: Bagel) -> None:
    plain, still = run(
        build_engine(model), build_request(noise=NoiseSettings()), build_request(1, noise=NoiseSettings())
    )
    assert plain.trajectory.recording.noisy_steps == still.trajectory.recording.noisy_steps == ()
    ode = run(Engine(model, PROGRAMS, prepare=crop_picture), build_request(noise=NoiseSettings()))[0]
    assert torch.equal(plain.trajectory.latent_LC, ode.trajectory.latent_LC)
    noisy = run(build_engine(model), build_request())[0]
    assert not torch.equal(noisy.trajectory.latent_LC, ode.trajectory.latent_LC)


def test_a_window_may_be_a_list(model: Bagel) -> None:
    """As a file gives it."""
    listed = build_request(noise=NoiseSettings("flow-grpo", 1.3, [1, 2]))
    assert listed.settings == build_request().settings
    ours, theirs = run(build_engine(model), listed)[0], run(build_engine(model), build_request())[0]
    assert torch.equal(ours.trajectory.latent_LC, theirs.trajectory.latent_LC)


def test_records_do_not_depend_on_the_company(model: Bagel) -> None:
    """Other windows, rules, sizes and none in one call; step caching beside it."""
    requests = [
        build_request(0),
        build_request(1, "cps", noise=NoiseSettings("cps", 0.5, (0, 4))),
        build_request(2, "dance-grpo", height=16, width=48),
        build_request(3, noise=NoiseSettings()),
        build_request(4, caching=CachingSettings(2, 1, 1)),
        build_request(5, guidance=GuidanceSettings(1.0)),
    ]
    together = run(build_engine(model), *requests)
    assert together[0].trajectory.recording.company != ("request 0",)
    for request, sample in zip(requests, together, strict=True):
        (alone,) = run(build_engine(model), request)
        assert alone.trajectory.recording.company == (request.id,)
        assert request.id in sample.trajectory.recording.company
        pairs = zip(
            alone.trajectory.recording.noisy_steps, sample.trajectory.recording.noisy_steps, strict=True
        )
        for one, other in pairs:
            assert one.index == other.index
            assert one.logprob == other.logprob
            for name in ("sample_LC", "next_LC", "velocity_LC"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSettings("brown", 1.0), "rule is 'brown'"),
        (lambda: NoiseSettings("cps", 1.5), "level is 1.5"),
        (lambda: NoiseSettings(level=-1.0), r"level is -1.0"),
        (lambda: NoiseSettings(window=(-1, 2)), r"window is \(-1, 2\)"),
        (lambda: NoiseSettings(window=(1, 0)), r"window is \(1, 0\)"),
        (
            lambda: Settings(num_timesteps=5, noise=NoiseSettings(level=1.0, window=(2, 3))),
            "within the 4 steps of 5 timesteps",
        ),
    ],
)
def test_settings_of_no_use_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
