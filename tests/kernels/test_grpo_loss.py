"""grpo_loss against float64, values and every gradient; its edges; and what must not change it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from realign_kernels import RatioGuard, VelocityKL, grpo_loss
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import needs_triton
from tests.kernels.grpo_cases import SCALARS, LossResult, call_op, make_case, run_op, run_plain

IMPLS = ["reference", pytest.param("triton", marks=needs_triton)]
# Lengths, channels: one entry of one token, an empty entry, odd channels, more entries than a block, an entry
# of more tiles than a block, a token wider than a tile.
SHAPES = [
    ([1], 4),
    ([3, 0, 5], 7),
    ([6, 1, 17, 2], 1),
    ([1] * 130, 2),
    ([70_000, 3], 4),
    ([2], 9000),
    ([4, 2], 0),
]
OPTIONS = [
    {},
    {"has_guard": False, "has_weights": False},
    {"has_kl": False},
    {"has_guard": False, "has_kl": False},
]


def assert_exact(actual: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """The error is at most twice that of plain torch, or four roundings: a few numbers may be lucky there."""
    assert actual.shape == exact.shape
    assert actual.dtype == dtype
    if exact.numel() > 0:
        units = 4 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps * (dtype != torch.float32)
        allowed = torch.maximum(2 * (plain.double() - exact).abs().max(), units * exact.abs().max())
        error = (actual.double() - exact).abs().max()
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def assert_as_exact_as_plain(actual: LossResult, plain: LossResult, exact: LossResult) -> None:
    for name in ("ratio_N", "kl_N"):
        if exact.metrics[name] is None:
            assert actual.metrics[name] is None
        else:
            assert_exact(actual.metrics[name], plain.metrics[name], exact.metrics[name])
    for name, grad in exact.grads.items():
        assert_exact(actual.grads[name], plain.grads[name], grad, plain.grads[name].dtype)
    # Sums of a few numbers of about this size, positive and negative.
    size = 1 + exact.metrics["ratio_N"].max().item()
    torch.testing.assert_close(actual.loss.double(), exact.loss, rtol=1e-6, atol=2e-6 * size)
    for name in SCALARS:
        if exact.metrics[name] is None:
            assert actual.metrics[name] is None
        else:
            metric = actual.metrics[name].double()
            torch.testing.assert_close(metric, exact.metrics[name], rtol=1e-6, atol=2e-6 * size, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "all")
@pytest.mark.parametrize(("lengths", "channels"), SHAPES, ids=lambda x: len(x) if isinstance(x, list) else x)
def test_error_is_that_of_plain_torch_at_most(lengths, channels, options, impl):
    case = make_case(lengths, channels, **options)
    exact = run_plain(case.to(torch.float64), factor=3.0)
    assert_as_exact_as_plain(run_op(case, impl, factor=3.0), run_plain(case, factor=3.0), exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_velocities_and_log_probs(dtype, impl):
    case = make_case([9, 0, 30], 65).to(dtype)
    wide = case.to(torch.float32)
    half = replace(case, scale_N=wide.scale_N, guard_weight_N=wide.guard_weight_N)
    half = replace(half, weight_N=wide.weight_N, kl_weight_N=wide.kl_weight_N)
    exact, plain = run_plain(case.to(torch.float64), factor=3.0), run_plain(case, factor=3.0)
    assert_as_exact_as_plain(run_op(half, impl, factor=3.0), plain, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_scale_saves_small_float16_gradients(impl):
    case = make_case([64], 64, has_guard=False, has_weights=False, beta=1e-6)
    case = replace(case, velocity_LC=case.velocity_LC.half(), reference_LC=case.reference_LC.half())
    grad_LC = run_op(case, impl, factor=65536.0).grads["velocity_LC"]
    exact_LC = run_plain(case.to(torch.float64), factor=65536.0).grads["velocity_LC"]
    assert (exact_LC / 65536).abs().max() < 2**-24  # nothing would be left of it in float16
    torch.testing.assert_close(grad_LC.double(), exact_LC, rtol=1e-3, atol=2**-24)


def make_edge_case(log_ratio: list[float], advantage: list[float], clip: tuple[float, float]):
    """Entries of given log-ratios and advantages, without a KL."""
    count = len(log_ratio)
    case = make_case([0] * count, 1, has_guard=False, has_kl=False, has_weights=False, clip=clip)
    return replace(
        case,
        logprob_N=torch.tensor(log_ratio),
        old_N=torch.zeros(count),
        advantage_N=torch.tensor(advantage),
        denominator=1.0,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("clip", [(0.0, 0.0), (1e-5, 1e-5), (1.0, 0.0)])
def test_before_the_first_update_the_ratio_is_one(clip, impl):
    """At a ratio of exactly 1 the gradient is -A, even where the clip range has no width."""
    advantages = [1.5, -2.0, 0.0, -0.0]
    result = run_op(make_edge_case([0.0] * 4, advantages, clip), impl)
    assert result.metrics["ratio_N"].tolist() == [1.0] * 4
    assert result.grads["logprob_N"].tolist() == [-1.5, 2.0, 0.0, 0.0]
    assert result.loss == 0.5
    assert result.metrics["clip_fraction_high"] == result.metrics["clip_fraction_low"] == 0
    assert result.metrics["ratio_max"] == result.metrics["ratio_min"] == result.metrics["ratio_mean"] == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_ends_of_the_clip_range_belong_to_it(sign, impl):
    """As in torch's clamp. One float beyond it, the gradient of one sign of the advantage is gone."""
    log_ratio = sign * 0.3
    ratio = run_op(make_edge_case([log_ratio], [1.0], (0.9, 9.0)), impl).metrics["ratio_N"]
    inward = torch.nextafter(ratio, torch.ones(1))
    for bound, has_left in ((ratio, False), (inward, True)):
        clip = (0.9, bound.item() - 1) if sign > 0 else (1 - bound.item(), 9.0)
        result = run_op(make_edge_case([log_ratio] * 2, [1.0, -1.0], clip), impl)
        side, other = ("high", "low") if sign > 0 else ("low", "high")
        assert result.metrics[f"clip_fraction_{side}"] == has_left
        assert result.metrics[f"clip_fraction_{other}"] == 0
        kept = [not (has_left and sign > 0), not (has_left and sign < 0)]
        expected = torch.tensor([-1.0, 1.0]) * ratio * torch.tensor(kept)
        assert torch.equal(result.grads["logprob_N"], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tie_beyond_the_range_takes_half(impl):
    """Where A times ratio and A times bound round to one number, the maximum of torch halves the gradient."""
    ratio = run_op(make_edge_case([0.3], [1.0], (0.9, 9.0)), impl).metrics["ratio_N"]
    bound = torch.nextafter(ratio, torch.ones(1))
    candidates = torch.linspace(1, 2, 101)
    advantage = candidates[candidates * ratio == candidates * bound][0].item()
    case = make_edge_case([0.3, 0.3], [advantage, -advantage], (0.1, bound.item() - 1))
    expected = torch.tensor([-advantage, advantage]) * ratio / 2
    assert torch.equal(run_op(case, impl).grads["logprob_N"], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_overflow_and_what_is_not_a_number_are_torchs(impl):
    log_ratios = [89.0, 1e30, math.inf, -89.0, -104.0, -200.0, -math.inf, math.nan]
    for advantage in (2.0, -2.0, 0.0):
        case = make_edge_case(log_ratios, [advantage] * len(log_ratios), (0.2, 0.2))
        for entry in range(len(log_ratios)):
            alone = case.take(entry)
            actual, expected = run_op(alone, impl), run_plain(alone)
            for got, wanted in (
                (actual.loss, expected.loss),
                (actual.metrics["ratio_N"], expected.metrics["ratio_N"]),
                (actual.metrics["ratio_max"], expected.metrics["ratio_max"]),
                (actual.metrics["ratio_min"], expected.metrics["ratio_min"]),
                (actual.grads["logprob_N"], expected.grads["logprob_N"]),
            ):
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=2.0**-149, equal_nan=True)
    mixed = run_op(make_edge_case([0.1, math.nan, 0.2], [1.0] * 3, (0.2, 0.2)), impl)
    assert mixed.metrics["ratio_max"].isnan()
    assert mixed.metrics["ratio_min"].isnan()
    assert mixed.grads["logprob_N"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("limits", [(-1e-5, 1e-5), (-1.0, 1.0), (-87.0, 88.7)])
def test_the_ratio_is_within_a_unit_of_the_last_place(limits, impl):
    """Clip ranges of 1e-6 are 17 float32 numbers wide."""
    log_ratio_N = torch.linspace(*limits, 20_001)
    case = make_edge_case([0.0], [1.0], (0.1, 0.1))
    case = replace(case, logprob_N=log_ratio_N, old_N=torch.zeros(20_001), advantage_N=torch.zeros(20_001))
    ratio_N = run_op(case, impl).metrics["ratio_N"]
    exact_N = log_ratio_N.double().exp()
    unit_N = torch.nextafter(exact_N.float(), torch.full((20_001,), math.inf)).double() - exact_N.float()
    assert ((ratio_N.double() - exact_N) / unit_N).abs().max() < 1.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "all")
def test_no_entries(options, impl):
    result = run_op(make_case([], 4, **options), impl)
    assert result.loss == 0
    assert result.metrics["policy_loss"] == 0
    means = ("approx_kl", "ratio_mean", "ratio_max", "ratio_min", "clip_fraction_high", "kl_mean")
    assert all(result.metrics[name].isnan() for name in means if result.metrics[name] is not None)
    assert all(grad.numel() == 0 for grad in result.grads.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_an_entry_alone_has_the_bits_it_has_in_a_batch(impl):
    case = make_case([150, 0, 33, 1, 700], 65)
    batch = run_op(case, impl)
    alone = [run_op(case.take(entry), impl) for entry in range(5)]
    for name in ("ratio_N", "kl_N"):
        assert torch.equal(batch.metrics[name], torch.cat([result.metrics[name] for result in alone]))
    for name, grad in batch.grads.items():
        assert torch.equal(grad, torch.cat([result.grads[name] for result in alone]))


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_with_the_whole_denominator_add_up(impl):
    case = make_case([5, 6, 7], 8, denominator=3.0)
    whole, parts = run_op(case, impl), [run_op(case.take(entry), impl) for entry in range(3)]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    default = call_op(replace(case, denominator=None).to(device_of(impl)), impl)[0]
    assert torch.equal(default.cpu(), whole.loss)


@pytest.mark.parametrize("impl", IMPLS)
def test_kl_in_mean_space_is_a_weight(impl):
    """Flow-GRPO's: the means of two steps from the same x, over a deviation without sqrt(-dt)."""
    case = make_case([20, 31], 6, has_guard=False)
    x_LC, (a, b, dev) = torch.randn(51, 6), (1.02, -0.11, 0.7)
    weight = b**2 / (2 * dev**2)
    case = replace(case, kl_weight_N=torch.full((2,), weight), weight_N=torch.ones(2))
    means = [a * x_LC + b * velocity_LC for velocity_LC in (case.velocity_LC, case.reference_LC)]
    squares_LC = (means[0] - means[1]) ** 2 / (2 * dev**2)
    expected_N = torch.stack([squares_LC[:20].mean(), squares_LC[20:].mean()])
    torch.testing.assert_close(run_op(case, impl).metrics["kl_N"], expected_N, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    case = make_case([4, 3], 6)
    whole = run_op(case, impl)
    strided = replace(
        case, velocity_LC=case.velocity_LC.t().contiguous().t(), old_N=case.old_N.repeat(2, 1)[0]
    )
    strided = replace(strided, advantage_N=torch.stack([case.advantage_N] * 2, 1)[:, 1])
    actual = run_op(strided, impl)
    assert torch.equal(actual.loss, whole.loss)
    assert torch.equal(actual.grads["velocity_LC"], whole.grads["velocity_LC"])


@pytest.mark.parametrize("impl", IMPLS)
def test_records_have_no_gradient(impl):
    case = make_case([4, 3], 6).to(device_of(impl))
    records = {
        name: getattr(case, name).clone().requires_grad_() for name in vars(case) if name[-2:] in ("_N", "LC")
    }
    loss, metrics = call_op(replace(case, **records), impl)
    assert not any(value.requires_grad for value in vars(metrics).values())
    loss.backward()
    trained = {name for name, tensor in records.items() if tensor.grad is not None}
    assert trained == {"logprob_N", "bias_N", "velocity_LC"}
    with torch.no_grad():
        assert not call_op(replace(case, **records), impl)[0].requires_grad


@needs_triton
def test_backward_runs_once_or_says_so():
    case = make_case([4, 3], 6).to(device_of("triton"))
    velocity_LC = case.velocity_LC.clone().requires_grad_()
    loss, _ = call_op(replace(case, velocity_LC=velocity_LC), "triton")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_the_reference():
    case = make_case([3, 2, 1, 2], 3)
    trained = [tensor.detach().double().requires_grad_() for tensor in case.trained().values()]

    def loss(logprob_N, bias_N, velocity_LC):
        return call_op(
            replace(case, logprob_N=logprob_N, bias_N=bias_N, velocity_LC=velocity_LC), "reference"
        )[0]

    assert torch.autograd.gradcheck(loss, trained)


@given(
    lengths=st.lists(st.integers(0, 40), max_size=5),
    channels=st.integers(1, 70),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=40)
@needs_triton
def test_paths_agree(lengths, channels, options, seed):
    case = make_case(lengths, channels, seed, **options)
    actual, expected = run_op(case, "triton"), run_op(case, "reference")
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)
    for name, grad in expected.grads.items():
        torch.testing.assert_close(actual.grads[name], grad, rtol=1e-5, atol=1e-6)
    for name, value in expected.metrics.items():
        if value is not None:
            torch.testing.assert_close(actual.metrics[name], value, rtol=1e-5, atol=1e-5, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    from realign_kernels.grpo_loss import triton  # noqa: F401

    ops = torch.ops.realign_kernels
    case = make_case([3, 0, 5], 7).to(device_of("triton"))
    velocities = (case.velocity_LC.to(dtype), case.reference_LC.to(dtype), case.cu_seqlens)
    entries = (case.logprob_N, case.old_N, case.advantage_N)
    guard, numbers = (case.bias_N, case.scale_N, case.guard_weight_N), (0.9, 1.1, 0.04, 3.0)
    full = (*entries, *guard, case.weight_N, *velocities, case.kl_weight_N)
    torch.library.opcheck(ops.grpo_loss_triton.default, (*full, *numbers, True))
    torch.library.opcheck(ops.grpo_loss_triton.default, (*entries, *[None] * 8, *numbers, False))
    factor = torch.tensor(2.0, device=case.logprob_N.device)
    torch.library.opcheck(ops.scale_gradients_triton.default, (velocities[0], case.logprob_N, factor))


@needs_triton
def test_it_compiles_with_its_gradients():
    case = make_case([3, 0, 5], 7).to(device_of("triton"))
    results = []
    for run in (call_op, torch.compile(call_op, backend="aot_eager")):
        trained = case.trained()
        loss, metrics = run(replace(case, **trained), "triton")
        (3 * loss).backward()
        results.append([loss.detach(), metrics.ratio_N, *(tensor.grad for tensor in trained.values())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


ENTRIES = {"logprob_N": torch.zeros(2), "old_logprob_N": torch.zeros(2), "advantage_N": torch.zeros(2)}
OFFSETS = torch.tensor([0, 1, 3], dtype=torch.int32)


def kl_with(**changes) -> VelocityKL:
    return replace(VelocityKL(torch.zeros(3, 4), torch.zeros(3, 4), OFFSETS, 0.1), **changes)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("logprob_N", torch.zeros(2, 1), r"logprob_N has shape \(2, 1\): must be \[N\]"),
        ("logprob_N", torch.zeros(2, dtype=torch.int64), "logprob_N has dtype torch.int64: must be float32"),
        (
            "old_logprob_N",
            torch.zeros(3),
            r"old_logprob_N has shape \(3,\): must be that of logprob_N, \(2,\)",
        ),
        ("advantage_N", torch.zeros(2, device="meta"), "advantage_N is on meta: must be on cpu"),
        ("clip", (1.5, 0.1), r"clip is \(1.5, 0.1\): must reach from 0 to 1 below a ratio of 1, not 1.5"),
        ("clip", -0.1, r"clip is \(-0.1, -0.1\): must reach from 0 to 1 below"),
        ("clip", (0.1, math.inf), r"clip is \(0.1, inf\): must reach 0 or more, and finitely far, above"),
        ("guard", RatioGuard(bias_N=torch.zeros(1)), r"guard.bias_N has shape \(1,\): must be that of"),
        (
            "guard",
            RatioGuard(scale_N=-torch.ones(2)),
            r"guard.scale_N\[0\] is -1: must be finite and at least 0",
        ),
        ("guard", RatioGuard(weight_N=torch.ones(3)), r"guard.weight_N is torch.float32 \(3,\): must be"),
        ("weight_N", torch.tensor([1.0, math.nan]), r"weight_N\[1\] is nan: must be finite and at least 0"),
        ("denominator", 0.0, "denominator is 0.0: must be finite and above 0, or None"),
        (
            "kl",
            kl_with(velocity_LC=torch.zeros(3)),
            r"kl.velocity_LC has shape \(3,\): must be packed tokens",
        ),
        (
            "kl",
            kl_with(reference_LC=torch.zeros(3, 5)),
            r"kl.reference_LC has shape \(3, 5\): must be that of",
        ),
        (
            "kl",
            kl_with(cu_seqlens=OFFSETS[:2] * 3),
            "kl.cu_seqlens has 1 entries: must have as many as logprob_N, 2",
        ),
        ("kl", kl_with(cu_seqlens=OFFSETS * 2), r"cu_seqlens is \[0, 2, 6\]: must rise from 0 to"),
        ("kl", kl_with(beta=-1.0), "kl.beta is -1.0: must be finite and at least 0"),
        (
            "kl",
            kl_with(weight_N=torch.ones(3)),
            r"kl.weight_N is torch.float32 \(3,\): must be float32 \[2\]",
        ),
        ("impl", "cpp", "grpo_loss: impl is 'cpp': must be one of auto, reference, triton"),
    ],
)
def test_arguments(argument, value, message):
    with pytest.raises(ValueError, match=message):
        grpo_loss(**{**ENTRIES, "clip": 0.1, argument: value})


def test_velocities_lie_where_the_log_probs_do():
    velocity_LC = torch.zeros(3, 4, device="meta")
    kl = VelocityKL(velocity_LC, velocity_LC, OFFSETS.to("meta"), 0.1)
    with pytest.raises(ValueError, match=r"kl.velocity_LC is on meta: must be on cpu with logprob_N"):
        grpo_loss(**ENTRIES, clip=0.1, kl=kl)
