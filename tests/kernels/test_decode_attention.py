"""decode_attention: values and log-sum-exps against float64, and a row's bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from realign_kernels import decode_attention
from tests.kernels.attention_cases import LARGEST_SCORE, DecodeCase, assert_lse_is_exact
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import IMPLS, KERNELS, needs_cpp
from tests.kernels.model_ops import assert_as_exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Lengths; query and key heads; head dim: one token, no row, rows without tokens, odd sizes, mini's and
# BAGEL's heads, lengths about a block and a chunk.
CASES = [
    ([1], (1, 1), 1),
    ([], (4, 2), 8),
    ([0, 5, 0, 1], (4, 2), 7),
    ([3, 17, 2], (3, 3), 65),
    ([100, 63, 64, 65, 129], (4, 2), 32),
    ([140, 9], (28, 4), 128),
    ([255, 256, 257, 600], (6, 2), 16),
]


def run(case: DecodeCase, impl: str) -> tuple[Tensor, Tensor]:
    return decode_attention(case.query_RHD, case.key_RKSD, case.value_RKSD, case.length_R, impl=impl)


def check(case: DecodeCase, dtype: torch.dtype, impl: str) -> None:
    out_RHD, lse_RH = run(case.to(dtype).on(impl), impl)
    plain_RHD, _ = case.to(dtype).plain()
    _, plain_lse_RH = case.plain()
    exact_RHD, exact_lse_RH = case.to(torch.float64).plain()
    assert out_RHD.dtype == dtype
    assert out_RHD.is_contiguous()
    assert_as_exact(out_RHD, plain_RHD, exact_RHD, LARGEST_SCORE)
    assert_lse_is_exact(lse_RH, plain_lse_RH, exact_lse_RH)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "heads", "dim"), CASES)
def test_values(lengths, heads, dim, dtype, impl):
    check(DecodeCase.draw(lengths, heads, dim), dtype, impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens(dtype, impl):
    check(DecodeCase.draw([9_000, 1, 4_097], (3, 1), 24), dtype, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_slots_without_room(impl):
    out_RHD, lse_RH = run(DecodeCase.draw([0, 0], (4, 2), 8, spare=0).on(impl), impl)
    assert torch.equal(out_RHD, torch.zeros_like(out_RHD))
    assert torch.equal(lse_RH, torch.full_like(lse_RH, float("-inf")))


@pytest.mark.parametrize("impl", KERNELS)
@given(
    lengths=st.lists(st.integers(0, 150), max_size=3),
    key_heads=st.integers(1, 2),
    groups=st.integers(1, 9),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_any_size(lengths, key_heads, groups, dim, dtype, seed, impl):
    check(DecodeCase.draw(lengths, (groups * key_heads, key_heads), dim, seed=seed), dtype, impl)


def test_the_definition_in_float64():
    case = DecodeCase.draw([5, 0, 40], (4, 2), 8).to(torch.float64)
    for ours, exact in zip(run(case, "auto"), case.plain(), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_independent(dtype, impl):
    """In company of longer rows, in larger slots, on any number of threads: the bits of the row alone."""
    lengths = [300, 1, 64, 0, 65, 33, 190] + [7 + 5 * row for row in range(20)] * (impl == "cpp")
    case = DecodeCase.draw(lengths, (6, 2), 24, spare=70).to(dtype).on(impl)
    torch.set_num_threads(1)
    together = run(case, impl)
    for row in range(len(lengths)):
        for ours, alone in zip(together, run(case.take(row), impl), strict=True):
            assert torch.equal(ours[row : row + 1], alone)
    for num_threads in (2, 3) if impl == "cpp" else ():
        torch.set_num_threads(num_threads)
        try:
            results = run(case, impl)
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(results, together, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 20])
def test_strides_do_not_matter(dim, dtype, impl):
    case = DecodeCase.draw([20, 9], (4, 2), dim, spare=0).to(dtype).on(impl)
    expected = run(case, impl)
    slots = torch.stack((case.key_RKSD, case.value_RKSD))

    def check_slots(key_RKSD: Tensor, value_RKSD: Tensor) -> None:
        actual = run(replace(case, key_RKSD=key_RKSD, value_RKSD=value_RKSD), impl)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    by_token = slots.transpose(2, 3).contiguous().transpose(2, 3)
    check_slots(*by_token)
    check_slots(by_token[0], case.value_RKSD)
    wide = torch.full((2, 2, 2, 41, dim + 3), float("nan"), dtype=dtype, device=slots.device)
    wide[:, :, :, 1:40:2][:, :, :, :20, 2 : dim + 2] = slots
    check_slots(*wide[:, :, :, 1:40:2][:, :, :, :20, 2 : dim + 2])
    fused = torch.cat((case.query_RHD, case.query_RHD), dim=1)
    strided = replace(case, query_RHD=fused[:, 4:], length_R=case.length_R.repeat_interleave(2)[::2])
    assert all(torch.equal(a, b) for a, b in zip(run(strided, impl), expected, strict=True))
    turned = replace(case, query_RHD=case.query_RHD.mT.contiguous().mT)
    assert all(torch.equal(a, b) for a, b in zip(run(turned, impl), expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_may_share_their_tokens(impl):
    """A prefix of all rows, expanded: the bits of copies."""
    case = DecodeCase.draw([50] * 3, (4, 2), 32).on(impl)
    shared = [slot[1:2].expand(3, -1, -1, -1) for slot in (case.key_RKSD, case.value_RKSD)]
    length_R = torch.tensor([50, 12, 0], device=device_of(impl))
    views = DecodeCase(case.query_RHD, *shared, length_R)
    copies = DecodeCase(case.query_RHD, *(slot.contiguous() for slot in shared), length_R)
    assert shared[0].stride(0) == 0
    assert all(torch.equal(a, b) for a, b in zip(run(views, impl), run(copies, impl), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_lengths_may_be_32_bits(impl):
    case = DecodeCase.draw([5, 0, 9], (4, 2), 8).on(impl)
    short = replace(case, length_R=case.length_R.int())
    assert all(torch.equal(a, b) for a, b in zip(run(short, impl), run(case, impl), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_stay_finite(impl):
    """Scores of +-1e4: exponentials of them alone would be infinite, or all zero."""
    case = DecodeCase.draw([130, 40], (2, 1), 16, spare=0).on(impl)
    for sign in (1, -1):
        ones = torch.ones_like(case.key_RKSD)
        large = replace(case, query_RHD=torch.full_like(case.query_RHD, 2500.0), key_RKSD=sign * ones)
        out_RHD, lse_RH = run(large, impl)
        for row, length in enumerate((130, 40)):
            mean_D = case.value_RKSD[row, 0, :length].double().mean(0).float()
            torch.testing.assert_close(out_RHD[row], mean_D.expand(2, 16), rtol=1e-5, atol=1e-6)
            expected = sign * 1e4 + float(torch.tensor(float(length)).log())
            torch.testing.assert_close(lse_RH[row].cpu(), torch.full((2,), expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", KERNELS)
def test_opcheck(impl, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    case = DecodeCase.draw([5, 0, 9], (4, 2), 8, spare=0).on(impl)
    inputs = tuple(vars(case).values())
    run(case, impl)
    name = "decode_attention" if impl == "cpp" else "decode_attention_triton"
    torch.library.opcheck(getattr(torch.ops.realign_kernels, name).default, inputs)


@needs_cpp
def test_compiled_calls_are_the_op():
    case = DecodeCase.draw([5, 0, 9], (4, 2), 8)
    compiled = torch.compile(lambda case: run(case, "auto"), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(case), run(case, "cpp"), strict=True))


GOOD = vars(DecodeCase.draw([3, 2], (4, 2), 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query_RHD": torch.zeros(2, 8)},
            r"query_RHD has shape \(2, 8\): must be rows by heads by head dim",
        ),
        ({"query_RHD": torch.zeros(2, 4, 8).int()}, "query_RHD has dtype torch.int32: must be float32"),
        (
            {"key_RKSD": torch.zeros(3, 2, 6, 8)},
            r"key_RKSD and value_RKSD have shapes \(3, 2, 6, 8\) and \(2, 2, 6, 8\): both must be",
        ),
        (
            {"value_RKSD": torch.zeros(2, 2, 5, 8)},
            r"shapes \(2, 2, 6, 8\) and \(2, 2, 5, 8\): both must be \[2, K, S, 8\], to go with query_RHD",
        ),
        (
            {"key_RKSD": torch.zeros(2, 2, 8, 6).mT},
            r"key_RKSD has strides \(96, 48, 1, 6\): the numbers of a head",
        ),
        (
            {"value_RKSD": torch.zeros(2, 2, 6, 8).half()},
            "value_RKSD is torch.float16 on cpu: must be torch.float32 on cpu, as query_RHD",
        ),
        ({"key_RKSD": torch.zeros(2, 2, 6, 8, device="meta")}, "key_RKSD is torch.float32 on meta"),
        ({"query_RHD": torch.zeros(2, 3, 8)}, "key_RKSD has 2 heads: must be a divisor of the query's 3"),
        (
            {"length_R": torch.zeros(2)},
            r"length_R is torch.float32 \(2,\) on cpu: must be int64 or int32 \[2\] on cpu",
        ),
        ({"length_R": torch.zeros(3).long()}, r"length_R is torch.int64 \(3,\) on cpu"),
        ({"length_R": torch.tensor([3, 7])}, "length_R holds 7: must be from 0 to 6, the tokens of a slot"),
        ({"length_R": torch.tensor([-1, 3])}, "length_R holds -1: must be from 0 to 6"),
        (
            {"query_RHD": torch.zeros(2, 4, 8, requires_grad=True)},
            r"decode_attention: a tensor requires a gradient, and this op has none: use torch.no_grad\(\)",
        ),
        ({"impl": "cuda"}, "decode_attention: impl is 'cuda': must be one of auto, reference, cpp, triton"),
    ],
)
def test_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**GOOD, **change})


def test_without_gradients_a_trained_tensor_is_taken():
    case = replace(DecodeCase.draw([3], (2, 1), 4), query_RHD=torch.ones(1, 2, 4, requires_grad=True))
    with torch.no_grad():
        assert run(case, "auto")[0].isfinite().all()
