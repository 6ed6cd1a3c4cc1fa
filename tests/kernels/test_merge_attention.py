"""merge_attention: values and log-sum-exps against float64, sides without keys, and attention in parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from realign_kernels import decode_attention, merge_attention
from tests.kernels.attention_cases import DecodeCase, assert_lse_is_exact
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import IMPLS, KERNELS, needs_cpp
from tests.kernels.independence import assert_rows_are_independent, draw_rows
from tests.kernels.model_ops import assert_as_exact

# NumPy, in Triton's interpreter, warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens, heads, head dim: one number, no token, odd sizes, mini's and BAGEL's heads.
SHAPES = [(1, 1, 1), (0, 4, 8), (5, 3, 7), (70, 4, 32), (9, 28, 128), (3, 2, 300)]


@dataclass(frozen=True)
class MergeCase:
    """One call. Numbers of the outs are exact in bfloat16, so that casts lose nothing."""

    out_a_LHD: Tensor
    lse_a_LH: Tensor
    out_b_LHD: Tensor
    lse_b_LH: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int, int], seed: int = 0) -> MergeCase:
        """Log-sum-exps about 6, some equal, some far apart; one in six is that of a side without keys."""
        generator = torch.Generator().manual_seed(seed)
        outs = [torch.randn(shape, generator=generator).bfloat16().float() for _ in range(2)]
        lses = [6 + 4 * torch.randn(shape[:2], generator=generator) for _ in range(2)]
        kind_LH = torch.randint(6, shape[:2], generator=generator)
        lses[0][kind_LH == 0] = -math.inf
        lses[1] = torch.where(kind_LH == 1, lses[0], lses[1])
        lses[1][kind_LH == 2] -= 60
        return cls(outs[0], lses[0], outs[1], lses[1])

    def to(self, dtype: torch.dtype) -> MergeCase:
        wide = torch.promote_types(dtype, torch.float32)
        return MergeCase(
            self.out_a_LHD.to(dtype), self.lse_a_LH.to(wide), self.out_b_LHD.to(dtype), self.lse_b_LH.to(wide)
        )

    def on(self, impl: str) -> MergeCase:
        return MergeCase(*(tensor.to(device_of(impl)) for tensor in vars(self).values()))

    def swapped(self) -> MergeCase:
        return MergeCase(self.out_b_LHD, self.lse_b_LH, self.out_a_LHD, self.lse_a_LH)

    def plain(self) -> tuple[Tensor, Tensor]:
        """The formula as it is written."""
        lse_LH = torch.logaddexp(self.lse_a_LH, self.lse_b_LH)
        weights = [(lse - lse_LH).exp().nan_to_num(0)[..., None] for lse in (self.lse_a_LH, self.lse_b_LH)]
        out_LHD = weights[0] * self.out_a_LHD + weights[1] * self.out_b_LHD
        return out_LHD.to(self.out_a_LHD.dtype), lse_LH


def run(case: MergeCase, impl: str) -> tuple[Tensor, Tensor]:
    return merge_attention(*vars(case).values(), impl=impl)


def check(case: MergeCase, dtype: torch.dtype, impl: str) -> None:
    out_LHD, lse_LH = run(case.to(dtype).on(impl), impl)
    (plain_LHD, plain_lse_LH), (exact_LHD, exact_lse_LH) = (
        case.to(some).plain() for some in (dtype, torch.float64)
    )
    assert out_LHD.dtype == dtype
    assert out_LHD.is_contiguous()
    assert_as_exact(out_LHD, plain_LHD, exact_LHD)
    assert_lse_is_exact(lse_LH, plain_lse_LH, exact_lse_LH)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype, impl):
    check(MergeCase.draw(shape), dtype, impl)


@pytest.mark.parametrize("impl", KERNELS)
@given(
    num_tokens=st.integers(0, 40),
    num_heads=st.integers(1, 9),
    dim=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_any_size(num_tokens, num_heads, dim, dtype, seed, impl):
    check(MergeCase.draw((num_tokens, num_heads, dim), seed), dtype, impl)


def test_the_definition_in_float64():
    case = MergeCase.draw((20, 3, 8)).to(torch.float64)
    for ours, exact in zip(run(case, "auto"), case.plain(), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_side_without_keys_gives_the_bits_of_the_other(dtype, impl):
    """Whatever the side without keys holds; minus zeros too."""
    case = MergeCase.draw((6, 4, 33)).to(dtype).on(impl)
    out_LHD = torch.where(case.out_a_LHD > 1, -0.0, case.out_a_LHD)
    lse_LH = torch.where(case.lse_a_LH.isinf(), 3.7, case.lse_a_LH)
    nothing_LH = torch.full_like(lse_LH, -math.inf)
    for anything in (math.nan, math.inf, 1.0):
        one_sided = MergeCase(out_LHD, lse_LH, torch.full_like(out_LHD, anything), nothing_LH)
        for sides in (one_sided, one_sided.swapped()):
            merged_LHD, merged_lse_LH = run(sides, impl)
            assert torch.equal(merged_LHD, out_LHD)
            assert torch.equal(merged_LHD.signbit(), out_LHD.signbit())
            assert torch.equal(merged_lse_LH, lse_LH)
        empty = replace(one_sided, out_a_LHD=one_sided.out_b_LHD, lse_a_LH=nothing_LH)
        merged_LHD, merged_lse_LH = run(empty, impl)
        assert torch.equal(merged_LHD, torch.zeros_like(out_LHD))
        assert torch.equal(merged_lse_LH, nothing_LH)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_log_sum_exps(impl):
    """Of +-1e4 and 1e30, alone and against each other: no infinity, no NaN."""
    lse_H = torch.tensor([1e4, -1e4, 1e30, -1e30, 0.0])
    lse_a_LH, lse_b_LH = (lse_LH.contiguous() for lse_LH in torch.meshgrid(lse_H, lse_H, indexing="ij"))
    ones_LHD = torch.ones(5, 5, 3)
    case = MergeCase(ones_LHD, lse_a_LH, 3 * ones_LHD, lse_b_LH).on(impl)
    out_LHD, lse_LH = run(case, impl)
    expected_LH = torch.where(lse_a_LH > lse_b_LH, 1.0, torch.where(lse_a_LH < lse_b_LH, 3.0, 2.0))
    assert torch.equal(out_LHD.cpu(), expected_LH[..., None].expand(5, 5, 3))
    torch.testing.assert_close(lse_LH.cpu(), torch.logaddexp(lse_a_LH, lse_b_LH))


@pytest.mark.parametrize("impl", IMPLS)
def test_sides_may_be_swapped(impl):
    case = MergeCase.draw((30, 4, 16)).on(impl)
    assert all(torch.equal(a, b) for a, b in zip(run(case, impl), run(case.swapped(), impl), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_are_independent(impl):
    def run_rows(*tensors: Tensor):
        return merge_attention(*tensors, impl=impl), []

    shapes = ((3, 21), (3,), (3, 21), (3,))
    assert_rows_are_independent(impl, run_rows, draw_rows(impl, *shapes))


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    """Outs as heads of wider rows and by head; log-sum-exps by head, and of one token for all."""
    case = MergeCase.draw((12, 4, 20)).on(impl)
    expected = run(case, impl)
    out_a_LHD = torch.cat((case.out_a_LHD, case.out_a_LHD), 1)[:, 4:]
    out_b_LHD = case.out_b_LHD.transpose(0, 1).contiguous().transpose(0, 1)
    lse_a_LH, lse_b_LH = case.lse_a_LH.T.contiguous().T, case.lse_b_LH.repeat_interleave(2, 1)[:, ::2]
    views = MergeCase(out_a_LHD, lse_a_LH, out_b_LHD, lse_b_LH)
    assert all(torch.equal(a, b) for a, b in zip(run(views, impl), expected, strict=True))
    one = replace(case, lse_b_LH=case.lse_b_LH[:1].expand(12, 4))
    copy = replace(case, lse_b_LH=case.lse_b_LH[:1].repeat(12, 1))
    assert all(torch.equal(a, b) for a, b in zip(run(one, impl), run(copy, impl), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cut", [0, 1, 50, 99, 100])
def test_attention_in_two_parts_is_attention(cut, impl):
    """To a prefix of all rows, and to each row's own tokens after it."""
    case = DecodeCase.draw([100, 100], (4, 2), 32, spare=0)
    whole = case.to(torch.float64).plain()
    here = case.on(impl)
    parts = []
    for tokens in (slice(cut), slice(cut, None)):
        key_RKSD, value_RKSD = here.key_RKSD[:, :, tokens], here.value_RKSD[:, :, tokens]
        length_R = torch.full_like(here.length_R, key_RKSD.shape[2])
        parts += decode_attention(here.query_RHD, key_RKSD, value_RKSD, length_R, impl=impl)
    for ours, exact in zip(merge_attention(*parts, impl=impl), whole, strict=True):
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("impl", KERNELS)
def test_opcheck(impl, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    case = MergeCase.draw((5, 3, 8)).on(impl)
    run(case, impl)
    name = "merge_attention" if impl == "cpp" else "merge_attention_triton"
    torch.library.opcheck(getattr(torch.ops.realign_kernels, name).default, tuple(vars(case).values()))


@needs_cpp
def test_compiled_calls_are_the_op():
    case = MergeCase.draw((5, 3, 8))
    compiled = torch.compile(lambda case: run(case, "auto"), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(case), run(case, "cpp"), strict=True))


GOOD = vars(MergeCase.draw((3, 2, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"out_a_LHD": torch.zeros(3, 4)},
            r"out_a_LHD has shape \(3, 4\): must be tokens by heads by head dim",
        ),
        ({"out_a_LHD": torch.zeros(3, 2, 4).int()}, "out_a_LHD has dtype torch.int32: must be float32"),
        (
            {"out_b_LHD": torch.zeros(3, 2, 5)},
            r"out_b_LHD has shape \(3, 2, 5\): must be that of out_a_LHD, \(3, 2, 4\)",
        ),
        (
            {"out_b_LHD": torch.zeros(3, 2, 4).half()},
            "out_b_LHD has dtype torch.float16: must be that of out_a",
        ),
        ({"out_b_LHD": torch.zeros(3, 4, 2).mT}, r"out_b_LHD has strides \(8, 1, 2\): the numbers of a head"),
        (
            {"lse_a_LH": torch.zeros(2, 3)},
            r"lse_a_LH is torch.float32 \(2, 3\) on cpu: must be torch.float32 \[3, 2\] on cpu, a number per",
        ),
        (
            {"lse_b_LH": torch.zeros(3, 2).double()},
            r"lse_b_LH is torch.float64 \(3, 2\) on cpu: must be torch.f",
        ),
        ({"lse_b_LH": torch.zeros(3, 2, device="meta")}, r"lse_b_LH is torch.float32 \(3, 2\) on meta"),
        (
            {"out_b_LHD": torch.zeros(3, 2, 4, requires_grad=True)},
            r"merge_attention: a tensor requires a gradient, and this op has none: use torch.no_grad\(\)",
        ),
        ({"impl": "cuda"}, "merge_attention: impl is 'cuda': must be one of auto, reference, cpp, triton"),
    ],
)
def test_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        merge_attention(**{**GOOD, **change})
