"""New weights in a running engine: as in a fresh one, in place, all or none; nothing old is used after."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.model.weights import list_parts, published_name
from realign.reasoning.programs import PROGRAMS
from realign.runtime.context import Context, build_text_block, extend
from realign.runtime.engine import Engine
from realign.runtime.guidance import Branch
from realign.runtime.noise import NoiseKey
from realign.runtime.prepare import crop_picture
from realign.runtime.publish import LoRA
from realign.runtime.reader import Reader, Reading
from realign.runtime.request import Request, TextPart
from realign.runtime.sampler import DenoiseJob, denoise
from realign.runtime.schedule import Schedule
from realign.runtime.settings import TextSettings
from realign.runtime.text import decode_text

from .conftest import CHECKPOINT

GEN = "decoder.layers.1.gen"
QUERY, KEY, VALUE, GATE, UP = (f"{GEN}.{name}_proj" for name in ("q", "k", "v", "gate", "up"))


def build_engine(dtype: torch.dtype = torch.float32) -> Engine:
    """With a model of its own."""
    return Engine(Bagel.from_pretrained(CHECKPOINT, dtype=dtype), PROGRAMS, prepare=crop_picture)


@pytest.fixture
def engine() -> Engine:
    return build_engine()


def copy_state(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}


def find_rows(engine: Engine, linear: str) -> Tensor:
    """The weight of a projection, in place."""
    parts = list_parts(engine.model)
    return parts[published_name(f"{linear}.weight")].of(engine.model.state_dict())


def assert_holds(engine: Engine, state: dict[str, Tensor]) -> None:
    """The model's weights have these bits."""
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def draw_weights(engine: Engine, seed: int = 0) -> dict[str, Tensor]:
    """Other weights, near the old ones, of all tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in copy_state(engine).items()
    }


def draw_lora(engine: Engine, linear: str, seed: int = 0, rank: int = 3) -> LoRA:
    """Of some size beside the weight."""
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = find_rows(engine, linear).shape
    down_RI, up_OR = (torch.randn(shape, generator=generator) for shape in ((rank, inputs), (outputs, rank)))
    return LoRA(down_RI, up_OR, 0.05)


def run(engine: Engine, requests: list[Request]) -> list[tuple]:
    """What samples are: texts, pictures, latents."""
    samples = engine.run(requests)
    return [(s.trajectory.text_turns, s.image.tobytes(), s.trajectory.latent_LC) for s in samples]


def assert_same(actual: list[tuple], expected: list[tuple]) -> None:
    for (*ours, latent_LC), (*theirs, latent_too_LC) in zip(actual, expected, strict=True):
        assert ours == theirs
        assert torch.equal(latent_LC, latent_too_LC)


@pytest.mark.parametrize("has_published_names", [False, True])
def test_results_are_those_of_a_fresh_engine(
    engine: Engine, mixed_requests: list[Request], has_published_names: bool, tmp_path: Path
) -> None:
    """In place: every tensor lies where it lay."""
    before = run(engine, mixed_requests)
    places = {name: tensor.data_ptr() for name, tensor in engine.model.state_dict().items()}
    weights = draw_weights(engine)
    given = weights
    if has_published_names:
        given = {name: part.of(weights) for name, part in list_parts(engine.model).items()}
    assert engine.publish(given) == 1
    assert engine.weights_version == 1
    assert {name: tensor.data_ptr() for name, tensor in engine.model.state_dict().items()} == places
    engine.model.save_pretrained(tmp_path)
    fresh = Engine(Bagel.from_pretrained(tmp_path), PROGRAMS, prepare=crop_picture)
    assert_holds(fresh, weights)
    after = run(engine, mixed_requests)
    assert_same(after, run(fresh, mixed_requests))
    assert [one[1] for one in after] != [one[1] for one in before]


def test_some_tensors_in_another_dtype(engine: Engine) -> None:
    before, bias = copy_state(engine), torch.linspace(-1, 1, 32, dtype=torch.float64)
    engine.publish({f"{KEY}.bias": bias, "llm2vae.bias": before["llm2vae.bias"].bfloat16() + 1})
    changed = copy_state(engine)
    rows = list_parts(engine.model)[published_name(f"{KEY}.bias")]
    assert torch.equal(rows.of(changed), bias.float())
    before[rows.parameter][rows.rows] = bias.float()
    before["llm2vae.bias"] = (before["llm2vae.bias"].bfloat16() + 1).float()
    assert_holds(engine, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_lora_is_the_full_weight(dtype: torch.dtype, mixed_requests: list[Request]) -> None:
    """Named one by one, as they are fused, and as published, in float32 and rounded once."""
    engine, other = build_engine(dtype), build_engine(dtype)
    fused = {"qkv_proj": (QUERY, KEY, VALUE), "gate_up_proj": (GATE, UP)}
    apart = {linear: draw_lora(engine, linear, seed) for seed, linear in enumerate(sum(fused.values(), ()))}
    apart[f"{GEN}.o_proj"] = draw_lora(engine, f"{GEN}.o_proj", 9)
    full = {}
    for linear, lora in apart.items():
        exact = find_rows(engine, linear).double() + lora.scale * (
            lora.up_OR.double() @ lora.down_RI.double()
        )
        full[f"{linear}.weight"] = exact
    engine.publish(lora=apart)
    for linear in apart:
        exact, merged = full[f"{linear}.weight"], find_rows(engine, linear)
        # Half a unit of the dtype from the rounding, and what float32 loses before it.
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * exact.abs().max()
        assert ((merged.double() - exact).abs() <= bound).all()
    merged = {f"{linear}.weight": find_rows(engine, linear).clone() for linear in apart}
    other.publish(merged)
    assert_holds(other, copy_state(engine))
    assert_same(run(engine, mixed_requests[:3]), run(other, mixed_requests[:3]))
    other = build_engine(dtype)
    other.publish(lora={published_name(f"{linear}.weight"): lora for linear, lora in apart.items()})
    assert_holds(other, copy_state(engine))


def test_an_adapter_of_a_fused_projection(engine: Engine) -> None:
    """Its rows are those of the projections, one after the other."""
    generator = torch.Generator().manual_seed(0)
    weight = engine.model.get_parameter(f"{GEN}.qkv_proj.weight").detach()
    shapes = ((4, weight.shape[1]), (len(weight), 4))
    lora = LoRA(*(torch.randn(shape, generator=generator) for shape in shapes), 0.5)
    expected = weight + 0.5 * (lora.up_OR @ lora.down_RI)
    engine.publish(lora={f"{GEN}.qkv_proj": lora})
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_never_drift(dtype: torch.dtype) -> None:
    """What is merged depends on the last publish alone, and without adapters the base's bits are back."""
    engine, fresh = build_engine(dtype), build_engine(dtype)
    base = copy_state(engine)
    for seed in range(5):
        linears = (QUERY, UP) if seed % 2 else (QUERY, KEY, f"{GEN}.down_proj")
        engine.publish(lora={linear: draw_lora(engine, linear, seed) for linear in linears})
    fresh.publish(lora={linear: draw_lora(fresh, linear, 4) for linear in (QUERY, KEY, f"{GEN}.down_proj")})
    assert_holds(engine, copy_state(fresh))
    assert not torch.equal(find_rows(engine, QUERY), find_rows(build_engine(dtype), QUERY))
    assert engine.publish(lora={}) == 6
    assert_holds(engine, base)
    assert not engine.publisher.use.bases


def test_weights_under_an_adapter(engine: Engine) -> None:
    """Given together, the adapter is merged into the new weights; alone, new weights have no adapter."""
    weights = draw_weights(engine)
    bias, query = f"{GEN}.qkv_proj.bias", f"{QUERY}.weight"
    rows = list_parts(engine.model)[published_name(query)].of(weights)
    lora = draw_lora(engine, QUERY)
    engine.publish(lora={QUERY: draw_lora(engine, QUERY, 1), KEY: draw_lora(engine, KEY, 2)})
    engine.publish({query: rows, bias: weights[bias]}, {QUERY: lora})
    assert torch.equal(find_rows(engine, QUERY), rows.addmm(lora.up_OR, lora.down_RI, alpha=lora.scale))
    assert torch.equal(find_rows(engine, KEY), find_rows(build_engine(), KEY)), "its adapter was taken out"
    engine.publish(lora={})
    assert torch.equal(find_rows(engine, QUERY), rows)
    engine.publish(lora={QUERY: lora, KEY: draw_lora(engine, KEY)})
    with_adapter = find_rows(engine, KEY).clone()
    engine.publish({query: rows})
    assert torch.equal(find_rows(engine, QUERY), rows)
    assert torch.equal(find_rows(engine, KEY), with_adapter), "adapters that are not spoken of stay"


def test_the_models_own_weights_may_be_published(engine: Engine) -> None:
    """What adapters were merged into then is the base."""
    engine.publish(lora={QUERY: draw_lora(engine, QUERY)})
    merged = copy_state(engine)
    engine.publish(engine.model.state_dict())
    engine.publish(lora={})
    assert_holds(engine, merged)


NAN = torch.full((32,), math.nan)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"decoder.layers.9.gen.q_proj.weight": torch.zeros(1)},
            "decoder.layers.9.gen.q_proj.weight: the model",
        ),
        ({f"{KEY}.bias": torch.zeros(31)}, rf"{KEY}.bias is \[31\], the model asks for \[32\]"),
        ({f"{GEN}.qkv_proj.bias": torch.zeros(32)}, r"qkv_proj.bias is \[32\], the model asks for \[128\]"),
        ({f"{KEY}.bias": torch.zeros(32).int()}, f"{KEY}.bias is torch.int32: must be float32"),
        ({f"{KEY}.bias": NAN}, f"{KEY}.bias holds numbers that are not finite"),
        (
            {f"{KEY}.bias": torch.zeros(32), f"{GEN}.qkv_proj.bias": torch.zeros(128)},
            "qkv_proj.bias is given twice, under two names",
        ),
        (
            {f"{KEY}.bias": torch.zeros(32), published_name(f"{KEY}.bias"): torch.zeros(32)},
            "k_proj_moe_gen.bias is given twice",
        ),
    ],
)
def test_refused_weights_leave_everything_as_it_was(engine: Engine, weights: dict, message: str) -> None:
    engine.publish(lora={QUERY: draw_lora(engine, QUERY)})
    before, bases = copy_state(engine), dict(engine.publisher.use.bases)
    good = {"llm2vae.bias": torch.ones_like(before["llm2vae.bias"])}
    with pytest.raises(ValueError, match=message):
        engine.publish({**good, **weights}, {UP: draw_lora(engine, UP)})
    assert_holds(engine, before)
    assert engine.publisher.use.bases == bases
    assert engine.weights_version == 1


@pytest.mark.parametrize(
    ("linear", "change", "message"),
    [
        (f"{GEN}.x_proj", {}, f"{GEN}.x_proj: the model has none of this name"),
        (f"{GEN}.q_norm", {}, f"{GEN}.q_norm is no linear layer: it takes no LoRA"),
        ("embed_tokens", {}, "embed_tokens is no linear layer"),
        (KEY, {"down_RI": torch.zeros(3, 63)}, rf"{KEY}: down_RI is \[3, 63\], the model asks for \[3, 64\]"),
        (KEY, {"down_RI": torch.zeros(())}, rf"{KEY}: down_RI is \[\]"),
        (KEY, {"up_OR": torch.zeros(32, 2)}, rf"{KEY}: up_OR is \[32, 2\], the model asks for \[32, 3\]"),
        (KEY, {"up_OR": torch.zeros(32, 3).long()}, f"{KEY}: up_OR is torch.int64: must be float32"),
        (KEY, {"up_OR": torch.full((32, 3), math.inf)}, f"{KEY}: up_OR holds numbers that are not finite"),
        (KEY, {"scale": math.nan}, f"{KEY}: scale is nan: must be finite"),
        (published_name(f"{QUERY}.weight"), {}, "q_proj_moe_gen.weight is given twice"),
    ],
)
def test_refused_adapters_leave_everything_as_it_was(
    engine: Engine, linear: str, change: dict, message: str
) -> None:
    before = copy_state(engine)
    lora = replace(draw_lora(engine, KEY), **change)
    with pytest.raises(ValueError, match=message):
        engine.publish(
            {"llm2vae.weight": torch.zeros_like(before["llm2vae.weight"])},
            {QUERY: draw_lora(engine, QUERY), linear: lora},
        )
    assert_holds(engine, before)
    assert engine.weights_version == 0


def test_contexts_of_old_weights_are_refused(engine: Engine) -> None:
    model = engine.model
    block = build_text_block(model, "a mug")
    (context,) = extend(model, [Context()], [block])
    (again,) = extend(model, [context], [block])
    assert again.weights_version == 0
    engine.publish(draw_weights(engine))
    message = "read with version 0 of the weights, the model has version 1 now: read its prompt again"
    with pytest.raises(ValueError, match=message):
        extend(model, [Context(), context], [block, block])
    with pytest.raises(ValueError, match=message):
        decode_text(model, [again], [TextSettings(3)], [NoiseKey(0, "", stream="text")])
    (new,) = extend(model, [Context()], [block])
    branches = (Branch(new), Branch(context, 4.0, "text"))
    with pytest.raises(ValueError, match=message):
        denoise(model, [DenoiseJob(branches, 16, 16, Schedule.build(3, 1.0))])
    (written,) = decode_text(model, [new], [TextSettings(3)], [NoiseKey(0, "", stream="text")])
    assert new.weights_version == written.context.weights_version == 1


def test_a_reader_forgets_what_it_read(engine: Engine, mixed_requests: list[Request]) -> None:
    parts = mixed_requests[1].prompt.parts
    reader = Reader(engine.model, crop_picture, 4096)
    (old,) = reader.read([Reading((*parts, TextPart("a lamp")))])
    engine.publish(draw_weights(engine))
    (new,) = reader.read([Reading((*parts, TextPart("a lamp")))])
    (expected,) = Reader(engine.model, crop_picture, 4096).read([Reading((*parts, TextPart("a lamp")))])
    assert torch.equal(new.key(1), expected.key(1))
    assert not torch.equal(new.key(1), old.key(1))


def test_a_publish_while_a_batch_runs_is_refused(mixed_requests: list[Request]) -> None:
    refusals = []

    def publish_and_crop(image, config):
        with pytest.raises(
            ValueError, match="a batch is running: publish weights before it or after it"
        ) as info:
            engine.publish({"llm2vae.bias": torch.zeros(16)})
        refusals.append(info)
        return crop_picture(image, config)

    engine = Engine(Bagel.from_pretrained(CHECKPOINT), PROGRAMS, prepare=publish_and_crop)
    before = copy_state(engine)
    engine.run(mixed_requests[1:2])
    assert refusals
    assert_holds(engine, before)
    assert engine.publish(before) == 1


def test_a_stream_that_is_read_is_a_running_batch(engine: Engine, mixed_requests: list[Request]) -> None:
    weights, stream = draw_weights(engine), engine.stream(mixed_requests)
    next(stream)
    with pytest.raises(ValueError, match="a batch is running"):
        engine.publish(weights)
    stream.close()
    assert engine.publish(weights) == 1


def test_listeners_are_told_what_changed(engine: Engine) -> None:
    told = []
    engine.model.on_weights_changed.append(lambda names: told.append(set(names)))
    engine.publish({f"{KEY}.bias": torch.zeros(32)}, {UP: draw_lora(engine, UP)})
    engine.publish(lora={f"{GEN}.o_proj": draw_lora(engine, f"{GEN}.o_proj")})
    assert told == [
        {f"{GEN}.qkv_proj.bias", f"{GEN}.gate_up_proj.weight"},
        {f"{GEN}.gate_up_proj.weight", f"{GEN}.o_proj.weight"},
    ]


def test_engines_of_one_model_know_of_each_other(engine: Engine, mixed_requests: list[Request]) -> None:
    other = Engine(engine.model, PROGRAMS, prepare=crop_picture)
    base, stream = copy_state(engine), engine.stream(mixed_requests)
    next(stream)
    with pytest.raises(ValueError, match="a batch is running"):
        other.publish(base)
    stream.close()
    engine.publish(lora={QUERY: draw_lora(engine, QUERY)})
    other.publish(lora={QUERY: draw_lora(engine, QUERY, 1), KEY: draw_lora(engine, KEY)})
    engine.publish(lora={})
    assert_holds(engine, base)
