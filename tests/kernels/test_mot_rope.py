"""mot_rope: heads and all gradients against complex multiplication in float64, places, and the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from realign_kernels import KeyCache, QKNorm, RopeTable, mot_rope
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import IMPLS, KERNELS, needs_cpp
from tests.kernels.independence import assert_rows_are_independent, draw_rows
from tests.kernels.model_ops import assert_as_exact, find_ops, refuse_copies

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
# Tokens, query heads, key heads, head dim: one token, none, odd halves, the least, mini's and BAGEL's heads.
SHAPES = [
    (1, 2, 1, 4),
    (0, 4, 2, 8),
    (7, 3, 1, 6),
    (6, 1, 1, 2),
    (40, 4, 2, 32),
    (5, 28, 4, 128),
    (9, 5, 5, 66),
]


@dataclass(frozen=True)
class HeadsCase:
    """One call. Numbers are exact in bfloat16, so casts lose nothing. Weights are queries', then keys'."""

    query_LHD: Tensor
    key_LKD: Tensor
    rope: RopeTable
    weights: tuple[Tensor, ...]
    expert_L: Tensor | None
    out_index_L: Tensor | None
    grads: tuple[Tensor, Tensor]

    @classmethod
    def draw(
        cls, sizes: tuple[int, int, int, int], experts: int = 2, is_moved: bool = True, seed: int = 0
    ) -> HeadsCase:
        """`experts` 0 is without a norm."""
        generator = torch.Generator().manual_seed(seed)
        length, heads, key_heads, dim = sizes

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().float()

        expert_L = torch.randint(0, 2, (length,), generator=generator, dtype=torch.int32)
        return cls(
            numbers(length, heads, dim),
            numbers(length, key_heads, dim),
            RopeTable.build(torch.randint(0, 900, (length,), generator=generator), dim, 1e4),
            tuple(numbers(dim) for _ in range(2 * experts)),
            expert_L if experts > 1 else None,
            torch.randperm(length, generator=generator) if is_moved else None,
            (numbers(length, heads, dim), numbers(length, key_heads, dim)),
        )

    def to(self, target: torch.dtype | torch.device) -> HeadsCase:
        """Heads and weights in a dtype (the table too if that is float64); or all on a device."""
        is_device = isinstance(target, torch.device)
        weights, grads = (tuple(t.to(target) for t in group) for group in (self.weights, self.grads))
        indexes = (self.expert_L, self.out_index_L)
        if is_device:
            indexes = [None if index_L is None else index_L.to(target) for index_L in indexes]
        rope = self.rope
        if is_device or target == torch.float64:
            rope = RopeTable(rope.cos_LA.to(target), rope.sin_LA.to(target))
        heads = (self.query_LHD.to(target), self.key_LKD.to(target))
        return HeadsCase(*heads, rope, weights, *indexes, grads)

    @property
    def norm(self) -> QKNorm | None:
        return self.norm_of(self.weights)

    @staticmethod
    def norm_of(weights: tuple[Tensor, ...]) -> QKNorm | None:
        half = len(weights) // 2
        return QKNorm(weights[:half], weights[half:], EPS) if weights else None

    def run(self, impl: str) -> list[Tensor]:
        """Both results, then gradients of queries, keys and weights."""
        inputs = [t.detach().requires_grad_() for t in (self.query_LHD, self.key_LKD, *self.weights)]
        query, key, *weights = inputs
        norm = self.norm_of(tuple(weights))
        results = mot_rope(query, key, self.rope, norm, self.expert_L, self.out_index_L, impl=impl)
        return [*(result.detach() for result in results), *torch.autograd.grad(results, inputs, self.grads)]

    def run_cached(self, impl: str, cache: KeyCache) -> tuple[Tensor, Tensor]:
        indexes = (self.expert_L, self.out_index_L)
        return mot_rope(self.query_LHD, self.key_LKD, self.rope, self.norm, *indexes, cache, impl=impl)


def plain(case: HeadsCase) -> list[Tensor]:
    """A norm for each expert's tokens, then complex numbers turned by e^(i angle), in float32 or wider."""
    inputs = [t.detach().requires_grad_() for t in (case.query_LHD, case.key_LKD, *case.weights)]
    wide = torch.promote_types(case.query_LHD.dtype, torch.float32)
    turn_L1A = torch.complex(case.rope.cos_LA, case.rope.sin_LA)[:, None]
    results, half = [], len(case.weights) // 2
    for heads_LHD, weights in ((inputs[0], inputs[2 : 2 + half]), (inputs[1], inputs[2 + half :])):
        x = heads_LHD.to(wide)
        if weights:
            weight_WD = torch.stack(list(weights)).to(wide)
            expert_L = torch.zeros(len(x)).int() if case.expert_L is None else case.expert_L
            x = x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight_WD[expert_L.long()][:, None]
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first, second) * turn_L1A
        turned_LHD = torch.cat((turned.real, turned.imag), dim=-1).to(heads_LHD.dtype)
        if case.out_index_L is not None:
            turned_LHD = turned_LHD[case.out_index_L.argsort()]
        results.append(turned_LHD)
    return [*(result.detach() for result in results), *torch.autograd.grad(results, inputs, case.grads)]


def find_terms(exact: HeadsCase) -> list[float]:
    """The size of what may cancel in each result and gradient."""
    if not exact.query_LHD.numel():
        return [0.0] * (4 + len(exact.weights))
    row, over_rows = [], []
    for heads, grad in ((exact.query_LHD, exact.grads[0]), (exact.key_LKD, exact.grads[1])):
        scale = torch.rsqrt(heads.square().mean(-1, keepdim=True) + EPS)
        largest = grad.abs().max() * 2
        row.append(float(largest * (scale.max() if exact.weights else 1)))
        over_rows.append(float((heads * scale).abs().sum((0, 1)).max() * largest))
    weight = max((float(weight.abs().max()) for weight in exact.weights), default=1.0)
    num = len(exact.weights) // 2
    results = [float(heads.abs().max()) * weight for heads in (exact.query_LHD, exact.key_LKD)]
    return [*results, *(size * weight for size in row), *[over_rows[0]] * num, *[over_rows[1]] * num]


def check(case: HeadsCase, dtype: torch.dtype, impl: str) -> None:
    actual = case.to(dtype).to(device_of(impl)).run(impl)
    exact = case.to(torch.float64)
    expected = (plain(case.to(dtype)), plain(exact), find_terms(exact))
    for ours, low, true, term in zip(actual, *expected, strict=True):
        assert ours.dtype == dtype
        assert_as_exact(ours, low, true, term)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "is_moved"), [(0, True), (1, False), (2, False), (2, True)])
@pytest.mark.parametrize("sizes", SHAPES)
def test_values_and_gradients(sizes, experts, is_moved, dtype, impl):
    check(HeadsCase.draw(sizes, experts, is_moved), dtype, impl)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_seventy_thousand_tokens(impl):
    check(HeadsCase.draw((70_000, 2, 1, 16)), torch.bfloat16, impl)


@pytest.mark.parametrize("impl", KERNELS)
@given(
    sizes=st.tuples(st.integers(0, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 40)),
    experts=st.integers(0, 2),
    is_moved=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_any_size(sizes, experts, is_moved, dtype, seed, impl):
    check(HeadsCase.draw((*sizes[:3], 2 * sizes[3]), experts, is_moved, seed), dtype, impl)


@pytest.mark.parametrize("experts", [0, 1, 2])
def test_gradients_of_the_definition(experts):
    case = HeadsCase.draw((3, 2, 1, 4), experts).to(torch.float64)
    inputs = tuple(t.requires_grad_() for t in (case.query_LHD, case.key_LKD, *case.weights))

    def run(query, key, *weights):
        return mot_rope(query, key, case.rope, case.norm_of(weights), case.expert_L, case.out_index_L)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_depend_on_the_distance_only(impl):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 16, generator=generator).to(device_of(impl))

    def score(query_position: int, key_position: int) -> Tensor:
        positions = torch.tensor([query_position, key_position], device=query.device)
        heads = torch.cat((query, key))
        turned, _ = mot_rope(heads, heads, RopeTable.build(positions, 16, 1e4), impl=impl)
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-4)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_moved", [False, True])
def test_keys_go_to_the_cache(is_moved, dtype, impl):
    """To any slots of a cache laid out [heads, slots, dim], and nowhere else."""
    case = HeadsCase.draw((7, 3, 2, 6), is_moved=is_moved).to(dtype).to(device_of(impl))
    slot_L = torch.tensor([11, 2, 9, 0, 5, 10, 3], device=case.query_LHD.device)
    cache_KSD = torch.full((2, 12, 6), 7.0, dtype=dtype, device=slot_L.device)
    slots_SKD = cache_KSD.transpose(0, 1)
    query, key = case.run_cached(impl, KeyCache(slots_SKD, slot_L))
    expected_query, expected_key, *_ = case.run(impl)
    if is_moved:
        expected_key = expected_key[case.out_index_L]
    assert key is slots_SKD
    assert torch.equal(query, expected_query)
    assert torch.equal(cache_KSD[:, slot_L].transpose(0, 1), expected_key)
    untouched = torch.tensor([1, 4, 6, 7, 8], device=slot_L.device)
    assert (cache_KSD[:, untouched] == 7).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_call_leaves_the_cache_alone(impl):
    case = HeadsCase.draw((0, 3, 2, 6), experts=1).to(device_of(impl))
    slots_SKD = torch.ones(0, 2, 6, device=case.query_LHD.device)
    query, _ = case.run_cached(impl, KeyCache(slots_SKD, case.out_index_L))
    assert query.shape == (0, 3, 6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [(4, 2, 32), (3, 1, 6)])
def test_tokens_are_independent(sizes, impl):
    heads, key_heads, dim = sizes
    weights = torch.randn(4, dim, generator=torch.Generator().manual_seed(1)).to(device_of(impl))

    def run(query: Tensor, key: Tensor, angle_LA: Tensor, draw_L: Tensor, *grads: Tensor):
        rope, expert_L = RopeTable(angle_LA.cos(), angle_LA.sin()), (draw_L[:, 0] > 0).int()
        results = HeadsCase(query, key, rope, tuple(weights), expert_L, None, grads).run(impl)
        return results[:4], results[4:]

    shapes = ((heads, dim), (key_heads, dim))
    assert_rows_are_independent(impl, run, draw_rows(impl, *shapes, (dim // 2,), (1,), *shapes))


@pytest.mark.parametrize("impl", IMPLS)
def test_where_a_token_goes_does_not_change_it(impl):
    case = HeadsCase.draw((40, 4, 2, 16)).to(device_of(impl))
    order = case.out_index_L
    inverse = order.argsort()
    still = replace(case, out_index_L=None, grads=tuple(grad[order] for grad in case.grads))
    moved, kept = case.run(impl), still.run(impl)
    for ours, theirs in zip(moved, (*(result[inverse] for result in kept[:2]), *kept[2:]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    case = HeadsCase.draw((6, 2, 2, 10)).to(device_of(impl))

    def loosen(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(2, dim=0)[::2].transpose(0, -1).contiguous().transpose(0, -1)

    holes = HeadsCase(
        loosen(case.query_LHD),
        loosen(case.key_LKD),
        RopeTable(loosen(case.rope.cos_LA), loosen(case.rope.sin_LA)),
        tuple(weight.repeat_interleave(2)[::2] for weight in case.weights),
        case.expert_L.repeat_interleave(2)[::2],
        case.out_index_L.repeat_interleave(2)[::2],
        tuple(loosen(grad) for grad in case.grads),
    )
    for ours, theirs in zip(holes.run(impl), case.run(impl), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_read_where_they_lie(dtype, impl, monkeypatch):
    """Queries and keys of one fused projection, values beside them: no copy, forward and backward."""
    case = HeadsCase.draw((7, 3, 2, 6)).to(dtype).to(device_of(impl))
    fused_LFD = torch.cat((case.query_LHD, case.key_LKD, torch.zeros_like(case.key_LKD)), dim=1)
    query_LHD, key_LKD, _ = fused_LFD.split((3, 2, 2), dim=1)
    expected = case.run(impl)
    slot_L = torch.arange(7, device=query_LHD.device).flip(0)
    caches = [KeyCache(torch.zeros_like(case.key_LKD), slot_L) for _ in range(2)]
    case.run_cached(impl, caches[0])
    monkeypatch.setattr(Tensor, "contiguous", refuse_copies(Tensor.contiguous))
    views = replace(case, query_LHD=query_LHD, key_LKD=key_LKD)
    views.run_cached(impl, caches[1])
    assert torch.equal(caches[0].slots_SKD, caches[1].slots_SKD)
    for ours, theirs in zip(views.run(impl), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes_of_the_weights_may_differ(impl):
    case = HeadsCase.draw((6, 2, 2, 10)).to(device_of(impl))
    mixed = replace(case, weights=(case.weights[0].bfloat16(), *case.weights[1:])).run(impl)
    for ours, theirs in zip(mixed, case.run(impl), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


def test_angles_are_float32():
    table = RopeTable.build(torch.tensor([0, 1, 31000]), 16, 1e6)
    assert table.cos_LA.dtype == table.sin_LA.dtype == torch.float32
    exponent = torch.arange(0, 16, 2, dtype=torch.float64) / 16
    angle_LA = torch.tensor([0, 1, 31000], dtype=torch.float64)[:, None] / 1e6**exponent
    for ours, exact in ((table.cos_LA, angle_LA.cos()), (table.sin_LA, angle_LA.sin())):
        assert (ours - exact).abs().max() < 5e-3  # 31000 radians hold some 2e-3 in float32
    assert torch.equal(table.cos_LA[0], torch.ones(8))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("experts", [0, 1, 2])
def test_opcheck(experts, impl, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    case = HeadsCase.draw((5, 3, 2, 6), experts).to(device_of(impl))
    op, backward = find_ops("mot_rope", impl)
    query_weights, key_weights = (
        (*group, None, None)[:2] for group in (case.weights[:experts], case.weights[experts:])
    )
    heads = (case.query_LHD, case.key_LKD)
    rest = (
        case.rope.cos_LA,
        case.rope.sin_LA,
        *query_weights,
        *key_weights,
        case.expert_L,
        case.out_index_L,
        EPS,
    )
    torch.library.opcheck(backward, (*case.grads, *heads, *rest))
    slots_SKD = torch.zeros(9, 2, 6, device=heads[0].device)
    slot_L = torch.tensor([3, 8, 0, 1, 5], device=heads[0].device)
    cached = "mot_rope_cached" if impl == "cpp" else f"mot_rope_cached_{impl}"
    torch.library.opcheck(
        getattr(torch.ops.realign_kernels, cached).default, (*heads, *rest, slots_SKD, slot_L)
    )
    for tensor in (*heads, *case.weights):
        tensor.requires_grad_()
    torch.library.opcheck(op, (*heads, *rest))


def test_compiled_gives_the_same(monkeypatch):
    """torch.compile traces through the op and its gradient."""
    monkeypatch.undo()
    case = HeadsCase.draw((5, 3, 2, 6))

    def run(query: Tensor, key: Tensor, *weights: Tensor) -> Tensor:
        norm = case.norm_of(weights)
        query, key = mot_rope(query, key, case.rope, norm, case.expert_L, case.out_index_L)
        return query.sin().sum() + key.exp().sum()

    inputs = [t.clone().requires_grad_() for t in (case.query_LHD, case.key_LKD, *case.weights)]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, run))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
