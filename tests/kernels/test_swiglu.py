"""swiglu: the product and both gradients against float64, and an element's bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from realign_kernels import swiglu
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import IMPLS, KERNELS, needs_cpp
from tests.kernels.independence import assert_rows_are_independent, draw_rows
from tests.kernels.model_ops import assert_as_exact, find_ops, refuse_copies

# NumPy, in Triton's interpreter, warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Gate, up, and the gradient of the product."""
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3)]


def differentiate(function, gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
    """The product and both gradients."""
    gate, up = (tensor.detach().requires_grad_() for tensor in (gate, up))
    out = function(gate, up)
    return [out.detach(), *torch.autograd.grad(out, (gate, up), grad)]


def check(impl: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> None:
    tensors = draw(shape, dtype, seed)
    ours = [tensor.to(device_of(impl)) for tensor in tensors]
    actual = differentiate(lambda gate, up: swiglu(gate, up, impl=impl), *ours)
    plain = differentiate(lambda gate, up: F.silu(gate) * up, *tensors)
    wide = [tensor.double() for tensor in tensors]
    exact = differentiate(lambda gate, up: gate / (1 + (-gate).exp()) * up, *wide)
    for ours, low, true in zip(actual, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_exact(ours, low, true)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (5, 7), (3, 2, 65), (40, 129)])
def test_values_and_gradients(shape, dtype, impl):
    check(impl, shape, dtype)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_seventy_thousand_tokens(impl):
    check(impl, (70_000, 65), torch.bfloat16)


@pytest.mark.parametrize("impl", KERNELS)
@given(
    length=st.integers(0, 40),
    width=st.integers(0, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_any_size(length, width, dtype, seed, impl):
    check(impl, (length, width), dtype, seed)


def test_gradients_of_the_definition():
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_are_independent(impl):
    def run(gate: Tensor, up: Tensor, grad: Tensor):
        halves = torch.cat((gate, up), dim=1)
        return [
            *differentiate(lambda gate, up: swiglu(gate, up, impl=impl), gate, up, grad),
            swiglu(halves, impl=impl),
        ], []

    assert_rows_are_independent(impl, run, draw_rows(impl, (127,), (127,), (127,)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (5, 0), (5, 7), (3, 2, 65), (9, 600)])
def test_both_halves_in_one_tensor(shape, dtype, impl):
    """The same bits as two tensors give, and one gradient."""
    gate, up, grad = (tensor.to(device_of(impl)) for tensor in draw(shape, dtype))
    expected = differentiate(lambda gate, up: swiglu(gate, up, impl=impl), gate, up, grad)
    fused = torch.cat((gate, up), dim=-1).requires_grad_()
    out = swiglu(fused, impl=impl)
    (grads,) = torch.autograd.grad(out, fused, grad)
    for ours, theirs in zip((out, *grads.chunk(2, dim=-1)), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("impl", KERNELS)
def test_rows_are_read_where_they_lie(impl, monkeypatch):
    """Halves of a tensor, rows with holes, a row for all: no copy, forward and backward."""
    gate, up, grad = (tensor.to(device_of(impl)) for tensor in draw((6, 10), torch.float32))
    holes = torch.cat((gate, up, gate), dim=1)
    expected = differentiate(lambda gate, up: swiglu(gate, up, impl=impl), gate, up[:1].expand(6, 10), grad)
    monkeypatch.setattr(Tensor, "contiguous", refuse_copies(Tensor.contiguous))
    views = (holes[:, :10], holes[:1, 10:20].expand(6, 10), grad)
    actual = differentiate(lambda gate, up: swiglu(gate, up, impl=impl), *views)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_number(dtype, impl):
    """The activation of each of the 65,536 is torch's within one step, and is rounded before it weighs."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    gate = bits.view(dtype).to(device_of(impl))
    actual, expected = swiglu(gate, torch.ones_like(gate), impl=impl), F.silu(gate)
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=2e-36, equal_nan=True)
    finite = actual.isfinite()
    up = torch.full_like(gate, 0.7)
    assert torch.equal(swiglu(gate, up, impl=impl)[finite], (actual * up)[finite])


@pytest.mark.parametrize("impl", IMPLS)
def test_far_from_zero_values_and_gradients_are_finite(impl):
    gate = torch.tensor([-1e4, -200.0, -90.0, 90.0, 1e4], device=device_of(impl))
    value, grad_gate, _ = differentiate(
        lambda gate, up: swiglu(gate, up, impl=impl), gate, torch.ones_like(gate), torch.ones_like(gate)
    )
    expected = torch.tensor([0.0, 0, 0, 90, 1e4]), torch.tensor([0.0, 0, 0, 1, 1])
    torch.testing.assert_close(value.cpu(), expected[0], rtol=0, atol=1e-30)
    torch.testing.assert_close(grad_gate.cpu(), expected[1], rtol=0, atol=1e-30)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    gate, up, grad = (tensor.to(device_of(impl)) for tensor in draw((6, 10), torch.float32))

    def run(*tensors: Tensor) -> list[Tensor]:
        return differentiate(lambda gate, up: swiglu(gate, up, impl=impl), *tensors)

    holes = (gate.T.contiguous().T, up.repeat(1, 2)[:, :10], grad[:1].expand(6, 10))
    expected = run(gate, up, grad[:1].repeat(6, 1))
    assert all(torch.equal(a, b) for a, b in zip(run(*holes), expected, strict=True))


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, impl, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    gate, up, grad = (tensor.to(device_of(impl)) for tensor in draw((5, 9), dtype))
    op, backward = find_ops("swiglu", impl)
    torch.library.opcheck(backward, (grad, gate, up))
    torch.library.opcheck(backward, (grad, torch.cat((gate, up), dim=1), None))
    torch.library.opcheck(op, (torch.cat((gate, up), dim=1).requires_grad_(), None))
    torch.library.opcheck(op, (gate.requires_grad_(), up.requires_grad_()))


@needs_cpp
def test_auto_is_cpp_on_a_cpu_also_where_a_gradient_is_wanted():
    gate, up, _ = draw((3, 4), torch.float32)
    assert torch.equal(swiglu(gate, up), swiglu(gate, up, impl="cpp"))
    out = swiglu(gate.requires_grad_(), up)
    assert out.grad_fn.name() == "swigluBackward"
