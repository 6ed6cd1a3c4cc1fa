"""mot_norm_fp8: the bits of the two ops that it joins, and their float64 values within one rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from realign_kernels import mot_norm, mot_norm_fp8, quantize_fp8
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import IMPLS
from tests.kernels.fp8_cases import DTYPES, assert_same_bits, assert_within_one_rounding

SCALE, EPS = 2.0**-7, 1e-6


def draw(
    length: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and residual; weights of the experts."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(length, width, generator=generator).to(device, dtype) for _ in range(2)]
    weights = [(1 + 0.3 * torch.randn(width, generator=generator)).to(device, dtype) for _ in range(2)]
    return rows, weights


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("length", "num_und", "width"), [(1, 0, 1), (0, 0, 4), (5, 2, 7), (9, 9, 65), (37, 3, 130), (3, 1, 3000)]
)
def test_values(length, num_und, width, with_residual, dtype, impl):
    (hidden, residual), weights = draw(length, width, dtype, device_of(impl))
    residual = residual if with_residual else None
    normed, quantized, total = mot_norm_fp8(hidden, weights, num_und, SCALE, EPS, residual, impl=impl)
    expert_L = (torch.arange(length, device=hidden.device) >= num_und).int()
    expected = mot_norm(hidden, weights, EPS, expert_L, residual, impl=impl)
    expected_normed, expected_total = expected if with_residual else (expected, hidden)
    assert torch.equal(total, expected_total)
    assert torch.equal(normed, expected_normed[:num_und])
    assert_same_bits(quantized, quantize_fp8(expected_normed[num_und:], SCALE))
    exact = total[num_und:].cpu().double()
    exact = exact * (exact.square().mean(-1, keepdim=True) + EPS).rsqrt() * weights[1].cpu().double()
    assert_within_one_rounding(quantized, exact, SCALE, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_are_independent(impl):
    (hidden, residual), weights = draw(37, 130, torch.bfloat16, device_of(impl))
    normed, quantized, total = mot_norm_fp8(hidden, weights, 4, SCALE, EPS, residual, impl=impl)
    for start in (0, 3, 4, 20, 36):
        part = slice(start, start + 1)
        alone = mot_norm_fp8(hidden[part], weights, int(start < 4), SCALE, EPS, residual[part], impl=impl)
        assert torch.equal(alone[2], total[part])
        if start < 4:
            assert torch.equal(alone[0], normed[part])
        else:
            assert_same_bits(alone[1], quantized[start - 4 : start - 3])


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_two_dtypes_and_rows_with_holes(impl):
    (hidden, residual), (und, gen) = draw(7, 20, torch.bfloat16, device_of(impl))
    expected = mot_norm_fp8(hidden, [und, gen], 2, SCALE, EPS, residual, impl=impl)
    wide = torch.cat((hidden, hidden), dim=1)[:, :20]
    found = mot_norm_fp8(wide, [und.float(), gen], 2, SCALE, EPS, residual, impl=impl)
    assert torch.equal(found[0], expected[0])
    assert_same_bits(found[1], expected[1])


def test_opcheck():
    pytest.importorskip("triton")
    import realign_kernels.mot_norm_fp8.triton  # noqa: F401

    (hidden, residual), weights = draw(5, 7, torch.float32, device_of("triton"))
    op = torch.ops.realign_kernels.mot_norm_fp8_triton.default
    for given in (residual, None):
        torch.library.opcheck(op, (hidden, given, *weights, 2, SCALE, EPS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_LE": torch.zeros(3)}, r"hidden_LE has shape \(3,\)"),
        ({"weights": [torch.ones(4)]}, "weights has 1 tensors: must be understanding's and generation's"),
        ({"weights": [torch.ones(4), torch.ones(5)]}, r"weights\[1\] is torch.float32 \(5,\)"),
        ({"num_und": 4}, "num_und is 4: must be from 0 to 3"),
        ({"num_und": -1}, "num_und is -1"),
        ({"scale": 0.0}, "scale is 0.0: must be a positive number"),
        ({"residual_LE": torch.zeros(3, 4).half()}, "residual_LE has dtype torch.float16"),
        ({"impl": "cuda"}, "impl is 'cuda': must be one of auto, reference, cpp, triton"),
    ],
)
def test_what_it_refuses(change, message):
    arguments = {"hidden_LE": torch.zeros(3, 4), "weights": [torch.ones(4)] * 2, "num_und": 1, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        mot_norm_fp8(**(arguments | change))
