"""mot_norm: normed rows, the sum, and all gradients against float64, for one expert and two."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from realign_kernels import mot_norm
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import IMPLS, KERNELS, needs_cpp
from tests.kernels.independence import assert_rows_are_independent, draw_rows
from tests.kernels.model_ops import assert_as_exact, find_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
# Rows, width: one row, none, odd, one channel, mini's and BAGEL's widths, more rows than a program has.
SHAPES = [(1, 4), (0, 4), (5, 7), (6, 1), (150, 65), (3, 3584), (70, 128)]


@dataclass(frozen=True)
class NormCase:
    """One call. Numbers are exact in bfloat16, so that casts lose nothing."""

    hidden_LE: Tensor
    residual_LE: Tensor | None
    weights: tuple[Tensor, ...]
    expert_L: Tensor | None
    grads: tuple[Tensor, ...]  # of the normed rows, and of the sum

    @classmethod
    def draw(
        cls, num_rows: int, width: int, experts: int = 2, has_residual: bool = True, seed: int = 0
    ) -> NormCase:
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().float()

        expert_L = torch.randint(0, 2, (num_rows,), generator=generator, dtype=torch.int32)
        return cls(
            numbers(num_rows, width),
            numbers(num_rows, width) if has_residual else None,
            tuple(numbers(width) for _ in range(experts)),
            expert_L if experts > 1 else None,
            tuple(numbers(num_rows, width) for _ in range(1 + has_residual)),
        )

    def terms(self) -> list[float]:
        """The size of what may cancel in each result and gradient: a row of one number has no gradient."""
        total_LE = self.hidden_LE if self.residual_LE is None else self.hidden_LE + self.residual_LE
        scale_L1 = torch.rsqrt(total_LE.square().mean(-1, keepdim=True) + EPS)
        weight = torch.stack(self.weights).abs().max()
        row = (self.grads[0] * scale_L1).abs().max() * weight if len(total_LE) else torch.zeros(())
        over_rows = (self.grads[0] * total_LE * scale_L1).abs().sum(0).max()
        num = len(self.grads)
        return [0.0] * num + [float(row)] * num + [float(over_rows)] * len(self.weights)

    def to(self, target: torch.dtype | torch.device) -> NormCase:
        """In a dtype, weights and all; or on a device."""
        residual_LE = None if self.residual_LE is None else self.residual_LE.to(target)
        expert_L = self.expert_L
        if expert_L is not None and isinstance(target, torch.device):
            expert_L = expert_L.to(target)
        weights, grads = (
            tuple(tensor.to(target) for tensor in group) for group in (self.weights, self.grads)
        )
        return NormCase(self.hidden_LE.to(target), residual_LE, weights, expert_L, grads)

    def run(self, impl: str) -> list[Tensor]:
        """Results, then gradients of hidden, residual and weights."""
        leaves = [
            tensor.detach().requires_grad_()
            for tensor in (self.hidden_LE, self.residual_LE, *self.weights)
            if tensor is not None
        ]
        hidden_LE, *rest = leaves
        residual_LE = rest.pop(0) if self.residual_LE is not None else None
        results = mot_norm(hidden_LE, rest, EPS, self.expert_L, residual_LE, impl=impl)
        results = (results,) if residual_LE is None else results
        return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, self.grads)]


def plain(case: NormCase) -> list[Tensor]:
    """As BAGEL's code does it: a gather, a norm and a scatter for each expert, by autograd."""
    leaves = [
        tensor.detach().requires_grad_()
        for tensor in (case.hidden_LE, case.residual_LE, *case.weights)
        if tensor is not None
    ]
    hidden_LE, *rest = leaves
    total_LE = hidden_LE if case.residual_LE is None else rest.pop(0) + hidden_LE
    expert_L = torch.zeros(len(total_LE)).int() if case.expert_L is None else case.expert_L
    normed_LE = torch.zeros_like(total_LE)
    for number, weight in enumerate(rest):
        rows = (expert_L == number).nonzero()[:, 0]
        wide = total_LE[rows].to(torch.promote_types(total_LE.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        normed_LE = normed_LE.index_put((rows,), weight * normed.to(total_LE.dtype))
    results = (normed_LE,) if case.residual_LE is None else (normed_LE, total_LE)
    return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, case.grads)]


def check(case: NormCase, dtype: torch.dtype, impl: str) -> None:
    actual = case.to(dtype).to(device_of(impl)).run(impl)
    exact = plain(case.to(torch.float64))
    for ours, low, true, term in zip(actual, plain(case.to(dtype)), exact, case.terms(), strict=True):
        assert ours.dtype == dtype
        assert_as_exact(ours, low, true, term)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "has_residual"), [(1, False), (2, False), (1, True), (2, True)])
@pytest.mark.parametrize(("num_rows", "width"), SHAPES)
def test_values_and_gradients(num_rows, width, experts, has_residual, dtype, impl):
    check(NormCase.draw(num_rows, width, experts, has_residual), dtype, impl)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_seventy_thousand_tokens(impl):
    check(NormCase.draw(70_000, 65), torch.bfloat16, impl)


@pytest.mark.parametrize("impl", KERNELS)
@given(
    num_rows=st.integers(0, 70),
    width=st.integers(1, 300),
    experts=st.integers(1, 2),
    has_residual=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_any_size(num_rows, width, experts, has_residual, dtype, seed, impl):
    check(NormCase.draw(num_rows, width, experts, has_residual, seed), dtype, impl)


@pytest.mark.parametrize("experts", [1, 2])
def test_gradients_of_the_definition(experts):
    case = NormCase.draw(4, 5, experts).to(torch.float64)
    inputs = tuple(t.requires_grad_() for t in (case.hidden_LE, case.residual_LE, *case.weights))

    def run(hidden_LE, residual_LE, *weights):
        return mot_norm(hidden_LE, weights, EPS, case.expert_L, residual_LE)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_in_bfloat16_sum_and_quotient_are_rounded_first(impl):
    """Each as a step of its own rounds: bit for bit what the unfused code gives."""
    case = NormCase.draw(9, 40).to(torch.bfloat16).to(device_of(impl))
    ones = tuple(torch.ones_like(weight) for weight in case.weights)
    given = (case.weights, EPS, case.expert_L)
    normed_LE, total_LE = mot_norm(case.hidden_LE, *given, case.residual_LE, impl=impl)
    assert torch.equal(total_LE, case.hidden_LE + case.residual_LE)
    assert torch.equal(normed_LE, mot_norm(total_LE, *given, impl=impl))
    unweighed_LE = mot_norm(total_LE, ones, EPS, case.expert_L, impl=impl)
    assert torch.equal(normed_LE, unweighed_LE * torch.stack(case.weights)[case.expert_L.long()])


@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes_may_differ(impl):
    """Under autocast: an update in bfloat16, the residual stream and the weights in float32."""
    case = NormCase.draw(9, 40)
    mixed = replace(case, hidden_LE=case.hidden_LE.bfloat16()).to(device_of(impl))
    actual, expected = mixed.run(impl), case.run("reference")
    assert [tensor.dtype for tensor in actual] == [torch.float32] * 2 + [torch.bfloat16] + [torch.float32] * 3
    for ours, theirs in zip(actual, expected, strict=True):
        rtol = 1e-5 if ours.dtype == torch.float32 else 8e-3
        torch.testing.assert_close(ours.cpu().float(), theirs, rtol=rtol, atol=1e-5)
    low = replace(case.to(torch.bfloat16), weights=case.weights).to(device_of(impl))
    same = case.to(torch.bfloat16).to(device_of(impl))
    assert torch.equal(low.run(impl)[0], same.run(impl)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes_of_the_weights_may_differ(impl):
    case = NormCase.draw(9, 40).to(device_of(impl))
    und, gen = case.weights
    mixed = replace(case, weights=(und.bfloat16(), gen)).run(impl)
    for ours, theirs in zip(mixed, case.run(impl), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_result_alone_may_have_a_gradient(impl):
    case = NormCase.draw(9, 40).to(device_of(impl))
    zeros = replace(case, grads=(torch.zeros_like(case.grads[0]), case.grads[1]))
    for index, changed in enumerate(
        (replace(case, grads=(case.grads[0], torch.zeros_like(case.grads[1]))), zeros)
    ):
        hidden_LE = case.hidden_LE.clone().requires_grad_()
        results = mot_norm(hidden_LE, case.weights, EPS, case.expert_L, case.residual_LE, impl=impl)
        (grad,) = torch.autograd.grad(results[index], hidden_LE, case.grads[index])
        assert torch.equal(grad, changed.run(impl)[2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 7, 128, 200])
def test_rows_are_independent(width, impl):
    weights = tuple(torch.randn(2, width, generator=torch.Generator().manual_seed(1)).to(device_of(impl)))

    def run(hidden_LE: Tensor, residual_LE: Tensor, draw_L: Tensor, *grads: Tensor):
        expert_L = (draw_L[:, 0] > 0).int()
        results = NormCase(hidden_LE, residual_LE, weights, expert_L, grads).run(impl)
        return results[:4], results[4:]

    assert_rows_are_independent(impl, run, draw_rows(impl, (width,), (width,), (1,), (width,), (width,)))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_order_of_experts_does_not_matter(impl):
    case = NormCase.draw(40, 16).to(device_of(impl))
    order = case.expert_L.argsort(stable=True)
    together = replace(
        case,
        hidden_LE=case.hidden_LE[order],
        residual_LE=case.residual_LE[order],
        expert_L=case.expert_L[order],
        grads=tuple(grad[order] for grad in case.grads),
    )
    for ours, theirs in zip(together.run(impl)[:4], case.run(impl)[:4], strict=True):
        assert torch.equal(ours, theirs[order])


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    case = NormCase.draw(6, 10).to(device_of(impl))
    holes = replace(
        case,
        hidden_LE=case.hidden_LE.T.contiguous().T,
        residual_LE=case.residual_LE.repeat(1, 2)[:, :10],
        weights=tuple(weight.repeat_interleave(2)[::2] for weight in case.weights),
        expert_L=case.expert_L.repeat_interleave(2)[::2],
        grads=tuple(grad.T.contiguous().T for grad in case.grads),
    )
    for ours, theirs in zip(holes.run(impl), case.run(impl), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("has_residual", [False, True])
def test_opcheck(has_residual, experts, impl, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    case = NormCase.draw(5, 9, experts, has_residual).to(device_of(impl))
    und, gen = (*case.weights, None)[:2]
    op, backward = find_ops("mot_norm", impl)
    scale_L = torch.rand(5, device=case.hidden_LE.device)
    grads = (*case.grads, None)[:2]
    torch.library.opcheck(backward, (*grads, case.hidden_LE, scale_L, und, gen, case.expert_L))
    for tensor in (case.hidden_LE, case.residual_LE, und, gen):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(op, (case.hidden_LE, case.residual_LE, und, gen, case.expert_L, EPS))


def test_compiled_gives_the_same(monkeypatch):
    """torch.compile traces through the op and its gradient."""
    monkeypatch.undo()
    case = NormCase.draw(8, 16)

    def run(hidden_LE: Tensor, residual_LE: Tensor, *weights: Tensor) -> Tensor:
        normed_LE, total_LE = mot_norm(hidden_LE, weights, EPS, case.expert_L, residual_LE)
        return (normed_LE * total_LE.sin()).sum()

    inputs = [t.clone().requires_grad_() for t in (case.hidden_LE, case.residual_LE, *case.weights)]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, run))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
