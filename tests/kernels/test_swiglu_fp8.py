"""swiglu_fp8: the bits of the two ops that it joins, and their float64 values within one rounding."""

from __future__ import annotations

import pytest
import torch

from realign_kernels import quantize_fp8, swiglu, swiglu_fp8
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import IMPLS
from tests.kernels.fp8_cases import DTYPES, assert_same_bits, assert_within_one_rounding

# NumPy, in Triton's interpreter, warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")


def draw(length: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    return (2 * torch.randn(length, 2 * width, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "width"), [(1, 1), (0, 4), (5, 7), (40, 129), (3, 600)])
def test_values(length, width, dtype, impl):
    gate_up_LE = draw(length, width, dtype)
    found = swiglu_fp8(gate_up_LE.to(device_of(impl)), 2.0**-6, impl=impl)
    gate, up = gate_up_LE.double().chunk(2, dim=1)
    assert found.shape == (length, width)
    assert_within_one_rounding(found, gate / (1 + (-gate).exp()) * up, 2.0**-6, dtype)
    device = device_of(impl)
    assert_same_bits(found, quantize_fp8(swiglu(gate_up_LE.to(device), impl=impl), 2.0**-6))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_are_independent_and_may_lie_apart(impl):
    gate_up_LE = draw(37, 65, torch.bfloat16).to(device_of(impl))
    whole = swiglu_fp8(gate_up_LE, 0.125, impl=impl)
    for start in (0, 5, 36):
        assert_same_bits(
            swiglu_fp8(gate_up_LE[start : start + 1], 0.125, impl=impl), whole[start : start + 1]
        )
    apart = torch.cat((gate_up_LE, gate_up_LE), dim=1)[:, :130]
    assert_same_bits(swiglu_fp8(apart, 0.125, impl=impl), whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_far_from_zero(impl):
    gate_up_LE = torch.tensor([[1e4, -1e4, 90.0, float("nan"), 1e4, 1e4, -1e4, 1.0]]).to(device_of(impl))
    found = swiglu_fp8(gate_up_LE, 1.0, impl=impl).float().cpu()
    expected = torch.tensor([[448.0, 0.0, -448.0, float("nan")]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_opcheck():
    pytest.importorskip("triton")
    import realign_kernels.swiglu_fp8.triton  # noqa: F401

    gate_up_LE = draw(5, 7, torch.float32).to(device_of("triton"))
    torch.library.opcheck(torch.ops.realign_kernels.swiglu_fp8_triton.default, (gate_up_LE, 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4), 1.0), r"gate_up_LE has shape \(4,\)"),
        ((torch.zeros(2, 3), 1.0), "gate_up_LE is 3 wide: must be even"),
        ((torch.zeros(2, 4), -1.0), "scale is -1.0: must be a positive number"),
        ((torch.zeros(2, 4), 1.0, "cuda"), "impl is 'cuda': must be one of auto, reference, cpp, triton"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        swiglu_fp8(*arguments)
