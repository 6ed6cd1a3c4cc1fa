"""A sample depends on its request alone: not on neighbours, order, batch size or memory bounds."""

from __future__ import annotations

import pytest
import torch

from realign.model.bagel import Bagel
from realign.model.fp8 import Fp8Scales, recording_inputs, use_fp8
from realign.reasoning.programs import PROGRAMS
from realign.runtime.engine import Engine
from realign.runtime.prepare import crop_picture

from .conftest import CHECKPOINT

pytestmark = pytest.mark.usefixtures("poison_fresh_memory")


def check_same(samples, others):
    """Equal texts, latents within 1e-5, pictures within a level."""
    others = {other.request.id: other for other in others}
    for sample in samples:
        other = others[sample.request.id]
        assert sample.reasoning == other.reasoning
        assert sample.trajectory.text_turns == other.trajectory.text_turns
        scale = other.trajectory.latent_LC.abs().max()
        difference = (sample.trajectory.latent_LC - other.trajectory.latent_LC).abs().max()
        assert difference <= 1e-5 * max(1.0, scale)
        levels, other_levels = (torch.tensor(list(s.image.tobytes())) for s in (sample, other))
        assert (levels - other_levels).abs().max() <= 1


@pytest.fixture
def alone(engine, mixed_requests):
    return [sample for request in mixed_requests for sample in engine.run([request])]


def test_in_a_batch(engine, mixed_requests, alone):
    check_same(engine.run(mixed_requests), alone)


def test_in_another_order(engine, mixed_requests, alone):
    batch = engine.run(mixed_requests[::-1])
    assert [sample.request.id for sample in batch] == [request.id for request in mixed_requests[::-1]]
    check_same(batch, alone)


def test_in_other_company(engine, mixed_requests, alone):
    check_same(engine.run(mixed_requests[1::2]), alone)
    check_same(engine.run([mixed_requests[2]] * 3 + mixed_requests[:1]), alone)


@pytest.mark.parametrize("memory_bytes", [1, 60_000])
def test_in_parts_that_fit_the_memory_bound(model, mixed_requests, alone, memory_bytes):
    bounded = Engine(model, PROGRAMS, prepare=crop_picture, memory_bytes=memory_bytes)
    check_same(bounded.run(mixed_requests), alone)


def test_text_was_really_sampled(alone):
    texts = {sample.reasoning.text for sample in alone if sample.reasoning}
    assert len(texts) == 4


def test_with_float8_products(mixed_requests):
    """As without them: quantised by static scales, a token's numbers are its own."""
    model = Bagel.from_pretrained(CHECKPOINT)
    engine = Engine(model, PROGRAMS, prepare=crop_picture)
    with recording_inputs(model) as find_scales:
        plain = engine.run(mixed_requests)
        scales = Fp8Scales("", find_scales())
    use_fp8(model, scales)
    alone = [sample for request in mixed_requests for sample in engine.run([request])]
    check_same(engine.run(mixed_requests), alone)
    for sample, other in zip(alone, plain, strict=True):
        assert not torch.equal(sample.trajectory.latent_LC, other.trajectory.latent_LC)


def test_seed_and_id_matter(engine, mixed_requests):
    from dataclasses import replace

    request = mixed_requests[1]
    base, *others = engine.run([request, replace(request, seed=99), replace(request, id="other")])
    for other in others:
        assert other.reasoning.text != base.reasoning.text
        assert not torch.allclose(other.trajectory.latent_LC, base.trajectory.latent_LC, atol=1e-2)
