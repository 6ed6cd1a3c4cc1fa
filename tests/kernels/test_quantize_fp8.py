"""quantize_fp8: every float8, every tie, the ends of the range, against the format itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realign_kernels import quantize_fp8
from tests.kernels.devices import device_of
from tests.kernels.fp8_cases import DTYPES, IMPLS, assert_same_bits, assert_within_one_rounding

# NumPy, in Triton's interpreter, warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")


def list_numbers() -> torch.Tensor:
    """All float8 that are numbers, as float64, in order."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return codes[~codes.isnan()].unique()


@pytest.mark.parametrize("impl", IMPLS)
def test_every_number_is_itself(impl):
    numbers = list_numbers().float().to(device_of(impl))
    assert len(numbers) == 253  # 0 and -0 are one
    assert torch.equal(quantize_fp8(numbers, 1.0, impl=impl).float(), numbers)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_lies_between_goes_to_the_nearest_and_a_tie_to_the_even(impl):
    numbers = list_numbers()
    low, high = numbers[:-1], numbers[1:]
    middle = ((low + high) / 2).float()
    below, above = middle.nextafter(torch.tensor(-1e9)), middle.nextafter(torch.tensor(1e9))
    device = device_of(impl)
    assert torch.equal(quantize_fp8(below.to(device), 1.0, impl=impl).cpu().double(), low)
    assert torch.equal(quantize_fp8(above.to(device), 1.0, impl=impl).cpu().double(), high)
    tied = quantize_fp8(middle.to(device), 1.0, impl=impl).cpu()
    assert bool(((tied.double() == low) | (tied.double() == high)).all())
    assert not (tied.view(torch.uint8) & 1).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_the_range(dtype, impl):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([448, 449, 464, 465, 6e4, inf, -inf, -1e3, nan, 0.0, -0.0, 2**-10, 2**-14], dtype=dtype)
    found = quantize_fp8(x.to(device_of(impl)), 1.0, impl=impl).cpu().float()
    expected = [448, 448, 448, 448, 448, 448, -448, -448, nan, 0, 0, 0, 0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
    assert found[10].signbit()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 7), (3, 2, 65), (40, 129)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-7, 0.03])
def test_values(shape, scale, dtype, impl):
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = quantize_fp8(x.to(device_of(impl)), scale, impl=impl)
    assert found.shape == x.shape
    assert_within_one_rounding(found, x.double(), scale, dtype)
    assert_same_bits(found, quantize_fp8(x, scale, impl="reference"))
    if scale == 2.0**-7:
        assert (found.float().abs() == 448).any() or not x.numel() or x.numel() < 40


@pytest.mark.parametrize("impl", IMPLS[1:])
@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=60), power=st.integers(-20, 20))
def test_any_bits(bits, power, impl):
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    found = quantize_fp8(x.to(device_of(impl)), 2.0**power, impl=impl)
    assert_same_bits(found, quantize_fp8(x, 2.0**power, impl="reference"))


@pytest.mark.parametrize("impl", IMPLS)
def test_holes_do_not_matter(impl):
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(1)).to(device_of(impl))
    assert_same_bits(quantize_fp8(x[:, ::2], 0.25, impl=impl), quantize_fp8(x, 0.25, impl=impl)[:, ::2])


def test_opcheck():
    pytest.importorskip("triton")
    import realign_kernels.quantize_fp8.triton  # noqa: F401

    x = torch.randn(5, 7, device=device_of("triton"))
    torch.library.opcheck(torch.ops.realign_kernels.quantize_fp8_triton.default, (x, 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, dtype=torch.int32), 1.0), "x has dtype torch.int32"),
        ((torch.zeros(3), 0.0), "scale is 0.0: must be a positive number"),
        ((torch.zeros(3), float("nan")), "scale is nan"),
        ((torch.zeros(3), 1.0, "cpp"), "impl is 'cpp': must be one of auto, reference, triton"),
        ((torch.zeros(3, requires_grad=True), 1.0), "quantize_fp8: a tensor requires a gradient"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_fp8(*arguments)
