"""The decoder: golden context, routes, gradients, low precision."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from realign.model.bagel import Bagel
from realign.model.mot import MixtureOfTransformers, Route
from realign_kernels import RopeTable

from .helpers import relative_error

EMPTY = torch.arange(0)


class CausalAttention:
    """`attend` for one sequence; remembers the keys and values it saw."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        self.keys[layer], self.values[layer] = key, value
        heads = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


@pytest.fixture
def decoder(golden_model: Bagel) -> MixtureOfTransformers:
    return golden_model.decoder


def _run(decoder: MixtureOfTransformers, hidden_LE: torch.Tensor, route: Route) -> torch.Tensor:
    return decoder(hidden_LE, torch.arange(len(hidden_LE)), route, CausalAttention())


def _mixed_route(length: int) -> Route:
    return Route.from_mask(torch.arange(length) % 3 == 1)


def test_golden_context_of_the_first_text(golden_model: Bagel, golden: dict, golden_json: dict) -> None:
    tokenizer = golden_model.tokenizer
    ids = [tokenizer.bos, *tokenizer.encode(golden_json["texts"][0]), tokenizer.eos]
    assert ids == golden_json["text_ids"][0]
    length, attend = len(ids), CausalAttention()
    with torch.no_grad():
        route = Route(torch.arange(length), EMPTY)
        golden_model.decoder(golden_model.embed_text(torch.tensor(ids)), torch.arange(length), route, attend)
    for layer in range(golden_model.config.llm.num_hidden_layers):
        assert relative_error(attend.keys[layer], golden[f"context.full.key.{layer}"][:length]) < 1e-5
        assert relative_error(attend.values[layer], golden[f"context.full.value.{layer}"][:length]) < 1e-5


@pytest.mark.parametrize("expert", ["und", "gen"])
def test_one_expert_alone_equals_the_general_path(decoder: MixtureOfTransformers, expert: str) -> None:
    """With both experts alike, every route computes the same."""
    decoder = copy.deepcopy(decoder)
    pairs = [(layer.und, layer.gen) for layer in decoder.layers] + [
        (decoder.norm["und"], decoder.norm["gen"])
    ]
    for und, gen in pairs:
        source, target = (und, gen) if expert == "und" else (gen, und)
        target.load_state_dict(source.state_dict())
    hidden_LE = torch.randn(13, 64)
    alone = Route(torch.arange(13), EMPTY) if expert == "und" else Route(EMPTY, torch.arange(13))
    assert alone.experts == (expert,)
    with torch.no_grad():
        expected = _run(decoder, hidden_LE, alone)
        torch.testing.assert_close(_run(decoder, hidden_LE, _mixed_route(13)), expected, rtol=0, atol=1e-5)


def test_experts_differ(decoder: MixtureOfTransformers) -> None:
    hidden_LE = torch.randn(5, 64)
    with torch.no_grad():
        und = _run(decoder, hidden_LE, Route(torch.arange(5), EMPTY))
        gen = _run(decoder, hidden_LE, Route(EMPTY, torch.arange(5)))
    assert not torch.allclose(und, gen, atol=1e-2)


def test_mixed_route_sends_each_token_to_its_expert(decoder: MixtureOfTransformers) -> None:
    """Without attention between tokens, each token's result is that of its expert alone."""
    hidden_LE, route = torch.randn(11, 64), _mixed_route(11)
    position_L = torch.randint(0, 100, (11,))

    def apart(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    with torch.no_grad():
        mixed = decoder(hidden_LE, position_L, route, apart)
        und = decoder(hidden_LE, position_L, Route(torch.arange(11), EMPTY), apart)
        gen = decoder(hidden_LE, position_L, Route(EMPTY, torch.arange(11)), apart)
    torch.testing.assert_close(mixed[route.und_index_L], und[route.und_index_L], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[route.gen_index_L], gen[route.gen_index_L], rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [0, 1])
def test_short_sequences(decoder: MixtureOfTransformers, length: int) -> None:
    hidden_LE = torch.randn(length, 64)
    assert _run(decoder, hidden_LE, Route(torch.arange(length), EMPTY)).shape == (length, 64)


def test_lengths_that_differ(decoder: MixtureOfTransformers) -> None:
    with pytest.raises(ValueError, match="4 tokens, 4 positions, a route for 3: not equal"):
        _run(decoder, torch.randn(4, 64), Route(torch.arange(3), EMPTY))


def test_unpack_and_pack_are_inverse_with_exact_gradients() -> None:
    route = Route(torch.tensor([5, 0, 3]), torch.tensor([4, 1, 2]))  # in any order
    assert (route.experts, route.sizes, route.length) == (("und", "gen"), [3, 3], 6)
    assert route.expert_L.tolist() == [0, 0, 0, 1, 1, 1]
    packed = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    tokens = route.unpack(packed)
    assert torch.equal(tokens, packed[[5, 0, 3, 4, 1, 2]])
    assert torch.equal(torch.cat(list(route.split(tokens))), tokens)
    assert torch.equal(route.pack(tokens), packed)

    def through(packed: torch.Tensor) -> torch.Tensor:
        und, gen = route.split(route.unpack(packed))
        return route.pack(torch.cat([und.sin(), gen.exp()]))

    assert torch.autograd.gradcheck(through, packed)
    assert torch.autograd.gradgradcheck(through, packed)
    (grad,) = torch.autograd.grad(route.split(route.unpack(packed))[1].sum(), packed)
    assert grad.flatten(1).sum(1).tolist() == [0, 6, 6, 0, 6, 0]


@pytest.mark.parametrize("expert", ["und", "gen"])
def test_one_expert_moves_nothing(expert: str) -> None:
    indexes = (torch.tensor([2, 0, 1]), EMPTY)
    route = Route(*indexes if expert == "und" else indexes[::-1])
    tokens = torch.randn(3, 4)
    assert (route.experts, route.expert_L, route.packed_index_L) == ((expert,), None, None)
    assert route.unpack(tokens) is tokens
    assert route.pack(tokens) is tokens
    assert route.split(tokens)[0] is tokens


def test_gradients_against_a_plain_choice(decoder: MixtureOfTransformers) -> None:
    """Both experts compute all tokens, and each token takes its own's: the same values and gradients."""
    hidden_LE, route = torch.randn(9, 64, requires_grad=True), _mixed_route(9)
    layer, position_L, everything = decoder.layers[0], torch.arange(9), torch.arange(9)
    is_gen_L1 = torch.zeros(9, 1).index_fill(0, route.gen_index_L, 1).bool()

    def attend(*heads: torch.Tensor) -> torch.Tensor:
        return CausalAttention()(0, *heads)

    def plain(hidden_LE: torch.Tensor) -> torch.Tensor:
        routes, rope = (
            (Route(everything, EMPTY), Route(EMPTY, everything)),
            RopeTable.build(position_L, 16, 1e6),
        )
        both = zip(*(layer.project(hidden_LE, None, rope, one) for one in routes), strict=True)
        hidden_LE, *heads = (
            torch.where(is_gen_L1.view(9, *(1,) * (und.dim() - 1)), gen, und) for und, gen in both
        )
        und, gen = (sum(layer.finish(hidden_LE, attend(*heads), one)) for one in routes)
        return torch.where(is_gen_L1, gen, und)

    rope = RopeTable.build(route.unpack(position_L), 16, 1e6)
    ours = route.pack(sum(layer(route.unpack(hidden_LE), None, rope, route, attend)))
    theirs = plain(hidden_LE)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    weight = torch.randn_like(ours)
    inputs = [hidden_LE, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_every_parameter_has_a_gradient(small_model: Bagel) -> None:
    route = _mixed_route(8)
    embedded = small_model.embed_text(torch.arange(8))
    hidden_LE = _run(small_model.decoder, embedded, route)
    (small_model.logits(hidden_LE).square().sum() + small_model.velocity(hidden_LE).exp().sum()).backward()
    parts = (small_model.embed_tokens, small_model.decoder, small_model.lm_head, small_model.llm2vae)
    for part in parts:
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_without_qk_norm(small_model: Bagel) -> None:
    config = replace(small_model.config.llm, qk_norm=False)
    decoder = MixtureOfTransformers(config)
    assert not [name for name, _ in decoder.named_parameters() if "q_norm" in name or "k_norm" in name]
    assert _run(decoder, torch.randn(4, 64), _mixed_route(4)).isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("route", [_mixed_route(21), Route(torch.arange(21), EMPTY)], ids=["mixed", "und"])
def test_bf16(decoder: MixtureOfTransformers, route: Route, autocast: bool) -> None:
    hidden_LE = torch.randn(21, 64)
    with torch.no_grad():
        expected = _run(decoder, hidden_LE, route)
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                low = _run(decoder, hidden_LE, route)
        else:
            low = _run(copy.deepcopy(decoder).bfloat16(), hidden_LE.bfloat16(), route)
            assert low.dtype == torch.bfloat16
    assert relative_error(low, expected) < 0.05
