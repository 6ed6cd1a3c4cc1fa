"""group_advantage against float64, Flow-GRPO's recorded advantages, and what must not change it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from realign_kernels import AdvantageRule, GroupAdvantages, group_advantage, native
from tests.kernels.devices import device_of
from tests.kernels.flow_cases import needs_cpp

GOLDEN = Path(__file__).parents[1] / "fixtures" / "bagel-tiny"
IMPLS = ["reference", pytest.param("cpp", marks=needs_cpp), "triton"]
COMPILED = ["cpp", "triton"] if native.is_available() else ["triton"]
# Members of each group: one sample, no sample, an empty group, groups of one, more than one tile.
SIZES = [[1], [], [3, 0, 5], [1, 2, 1, 7], [1040, 70]]
RULES = [
    AdvantageRule(),
    AdvantageRule(std="global", clamp=1.5),
    AdvantageRule(std="none", epsilon=0.0),
    AdvantageRule(correction=1, epsilon=1e-8),
    AdvantageRule(normalize="each", clamp=1.0),
    AdvantageRule(normalize="each", std="global", correction=1),
]


def make_groups(sizes: list[int], seed: int = 0) -> Tensor:
    """Group numbers in a random order."""
    group_N = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    return group_N[torch.randperm(len(group_N), generator=torch.Generator().manual_seed(seed))]


def make_rewards(*shape: int, seed: int = 0) -> Tensor:
    """As a scorer gives them, far from zero; exact in bfloat16, so that casts lose nothing."""
    rewards = 20 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return rewards.bfloat16().float()


def run(
    rewards: Tensor,
    group_N: Tensor,
    num_groups: int,
    weights_R: Tensor | None = None,
    rule: AdvantageRule | None = None,
    impl: str = "reference",
) -> GroupAdvantages:
    """The op on the device of the implementation; results on the CPU."""
    device = device_of(impl)
    weights_R = None if weights_R is None else weights_R.to(device)
    result = group_advantage(rewards.to(device), group_N.to(device), num_groups, weights_R, rule, impl)
    return GroupAdvantages(*(x.cpu() for x in vars(result).values()))


def normalize(value_NK: Tensor, group_N: Tensor, num_groups: int, rule: AdvantageRule):
    """Deviations over deviation, means, deviations: written apart from the reference, in the dtype given."""
    scaled_NK = torch.zeros_like(value_NK)
    mean_GK, std_GK = (value_NK.new_full((num_groups, value_NK.shape[1]), math.nan) for _ in range(2))
    for group in range(num_groups):
        own = group_N == group
        if own.any():
            mean_GK[group] = value_NK[own].mean(0)
            std_GK[group] = deviation(value_NK[own], rule.correction)
            std = deviation(value_NK, rule.correction) if rule.std == "global" else std_GK[group]
            scaled_NK[own] = value_NK[own] - mean_GK[group]
            if rule.std != "none":
                scaled_NK[own] /= std + rule.epsilon
    return scaled_NK, mean_GK, std_GK


def deviation(value_MK: Tensor, correction: int) -> Tensor:
    """Step by step: `torch.std` of float32 computes in float64."""
    squares_K = (value_MK - value_MK.mean(0)).square().sum(0)
    return (squares_K / max(len(value_MK) - correction, 1)).sqrt()


def expected(
    rewards_NR: Tensor, group_N: Tensor, num_groups: int, weights_R: Tensor, rule: AdvantageRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantages, means and deviations in the dtype of the rewards; the last two [G, K]."""
    weights_R = weights_R.to(rewards_NR.dtype)
    if rule.normalize == "sum":
        rewards_NR, weights_R = (rewards_NR * weights_R).sum(1, keepdim=True), weights_R.new_ones(1)
    scaled_NR, mean_GR, std_GR = normalize(rewards_NR, group_N, num_groups, rule)
    advantage_N = (scaled_NR * weights_R).sum(1)
    if rule.clamp is not None:
        advantage_N = advantage_N.clamp(-rule.clamp, rule.clamp)
    return advantage_N, mean_GR, std_GR


def assert_as_exact_as_plain(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of plain torch; or two units in the last place of the largest number.

    The second because a few numbers may be lucky in plain torch; deviation, root, epsilon and quotient each
    round by up to half a unit.
    """
    if exact.numel() > 0:
        units = 2 * torch.finfo(actual.dtype).eps * exact.abs().max()
        allowed = torch.maximum(2 * (plain.double() - exact).abs().max(), units)
        error = (actual.double() - exact).abs().max()
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_rewards", [1, 3])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.normalize}-{rule.std}-{rule.correction}")
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)}x{max(sizes, default=0)}")
def test_error_is_that_of_plain_torch_at_most(sizes, rule, num_rewards, impl):
    group_N, rewards_NR = make_groups(sizes), make_rewards(sum(sizes), num_rewards)
    weights_R = torch.tensor([1.0, 0.25, -2.0])[:num_rewards]
    arguments = (group_N, len(sizes), weights_R, rule)
    plain, exact = (expected(rewards, *arguments) for rewards in (rewards_NR, rewards_NR.double()))
    result = run(rewards_NR, *arguments, impl)
    assert result.is_degenerate_G.tolist() == [size < 2 for size in sizes]
    actual = (result.advantage_N, result.mean_G, result.std_G)
    for name, got, rounded, wanted in zip(("advantage", "mean", "std"), actual, plain, exact, strict=True):
        assert got.dtype == torch.float32, name
        rounded, wanted = (x.squeeze(1) if x.dim() > got.dim() else x for x in (rounded, wanted))
        assert torch.equal(got.isnan(), wanted.isnan()), name
        assert_as_exact_as_plain(*(x.nan_to_num() for x in (got, rounded, wanted)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rewards_are_widened_first(dtype, impl):
    group_N, rewards_N = make_groups([5, 3]), make_rewards(8).to(dtype)
    result, wide = (run(rewards, group_N, 2, impl=impl) for rewards in (rewards_N, rewards_N.float()))
    assert all(torch.equal(*pair) for pair in zip(vars(result).values(), vars(wide).values(), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("is_global", [False, True])
def test_recorded_flow_grpo_advantages(is_global, impl):
    recorded = load_file(GOLDEN / "rl.safetensors")
    prompts = json.loads((GOLDEN / "rl.json").read_text())["prompts"]
    names = sorted(set(prompts))
    group_N = torch.tensor([names.index(prompt) for prompt in prompts])
    rule = AdvantageRule(std="global" if is_global else "group")
    rewards_N, advantage_N = (
        recorded["advantage.rewards"],
        recorded[f"advantage.global_std_{is_global}"],
    )
    if impl == "reference":
        exact = group_advantage(rewards_N, group_N, len(names), rule=rule, impl=impl)
        assert exact.advantage_N.dtype == torch.float64
        torch.testing.assert_close(exact.advantage_N, advantage_N, rtol=0, atol=1e-12)
    result = run(rewards_N.float(), group_N, len(names), rule=rule, impl=impl)
    torch.testing.assert_close(result.advantage_N.double(), advantage_N, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", [AdvantageRule(), AdvantageRule(normalize="each")])
def test_a_group_has_its_bits_wherever_its_members_lie(rule, impl):
    sizes = [70, 0, 200, 3, 1]
    group_N, rewards_NR = make_groups(sizes), make_rewards(sum(sizes), 2)
    batch = run(rewards_NR, group_N, len(sizes), rule=rule, impl=impl)
    for group in (0, 2, 3, 4):
        own = group_N == group
        alone = run(rewards_NR[own], torch.zeros(int(own.sum()), dtype=torch.int64), 1, rule=rule, impl=impl)
        assert torch.equal(alone.advantage_N, batch.advantage_N[own])
        assert torch.equal(alone.mean_G[0], batch.mean_G[group])
        assert torch.equal(alone.std_G[0], batch.std_G[group])
    order = torch.sort(group_N, stable=True).indices
    moved = run(rewards_NR[order], group_N[order], len(sizes), rule=rule, impl=impl)
    assert torch.equal(moved.advantage_N, batch.advantage_N[order])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_equal_rewards_give_exactly_zero(std, impl):
    """The mean of 24 numbers 0.1, rounded, is not always 0.1; over epsilon that would be an advantage."""
    group_N = make_groups([24, 7, 24])
    rewards_N = torch.tensor([0.1, 0.7, 0.3])[group_N]
    rewards_N[group_N == 1] += torch.linspace(0, 1, 7)
    result = run(rewards_N, group_N, 3, rule=AdvantageRule(std=std), impl=impl)
    assert result.is_degenerate_G.tolist() == [True, False, True]
    assert torch.equal(result.mean_G[[0, 2]], torch.tensor([0.1, 0.3]))
    assert torch.equal(result.std_G[[0, 2]], torch.zeros(2))
    assert torch.equal(result.advantage_N[group_N != 1], torch.zeros(48))


@pytest.mark.parametrize("impl", IMPLS)
def test_degenerate_is_what_is_normalised(impl):
    group_N = torch.tensor([0, 0, 1, 1, 2, 2])
    rewards_NR = torch.tensor([[1.0, 2], [2, 1], [3, 4], [3, 4], [5, 6], [5, 7]])
    summed = run(rewards_NR, group_N, 3, impl=impl)
    each = run(rewards_NR, group_N, 3, rule=AdvantageRule(normalize="each"), impl=impl)
    assert summed.is_degenerate_G.tolist() == [True, True, False]
    assert each.is_degenerate_G.tolist() == [False, True, False]
    assert summed.mean_G.shape == (3,)
    assert each.mean_G.shape == each.std_G.shape == (3, 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_spoils_its_group_alone(number, impl):
    group_N, rewards_N = make_groups([6, 4, 5]), make_rewards(15)
    clean = run(rewards_N, group_N, 3, rule=AdvantageRule(clamp=5.0), impl=impl)
    rewards_N[(group_N == 1).nonzero()[2]] = number
    result = run(rewards_N, group_N, 3, rule=AdvantageRule(clamp=5.0), impl=impl)
    assert torch.equal(result.advantage_N.isnan(), group_N == 1)
    assert torch.equal(result.advantage_N[group_N != 1], clean.advantage_N[group_N != 1])
    assert not result.std_G[1].isfinite()
    assert not result.is_degenerate_G.any()
    spread = run(rewards_N, group_N, 3, rule=AdvantageRule(std="global"), impl=impl)
    assert spread.advantage_N.isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_without_members_has_no_mean(impl):
    result = run(make_rewards(2), torch.tensor([2, 2]), 4, impl=impl)
    assert result.mean_G.isnan().tolist() == result.std_G.isnan().tolist() == [True, True, False, True]
    assert result.is_degenerate_G.tolist() == [True, True, False, True]


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    group_N, rewards_NR, weights_R = make_groups([4, 5]), make_rewards(9, 3), torch.tensor([1.0, 2.0, 0.5])
    whole = run(rewards_NR, group_N, 2, weights_R, impl=impl)
    strided = run(
        rewards_NR.t().contiguous().t(),
        torch.stack([group_N, -group_N], 1)[:, 0],
        2,
        weights_R.repeat_interleave(2)[::2],
        impl=impl,
    )
    assert torch.equal(whole.advantage_N, strided.advantage_N)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_flows_to_the_rewards(impl):
    result = run(make_rewards(4).requires_grad_(), torch.tensor([0, 1, 0, 1]), 2, impl=impl)
    assert not any(x.requires_grad for x in vars(result).values())


@pytest.mark.parametrize("impl", COMPILED)
def test_a_sample_of_no_group_has_no_advantage(impl):
    """Where group numbers cannot be checked first."""
    from realign_kernels.group_advantage import cpp, triton

    op = {"cpp": cpp.group_advantage_cpp, "triton": triton.group_advantage_triton}[impl]
    device = device_of(impl)
    group_N = torch.tensor([0, -1, 1, 2, 0, 1, 1 << 40], device=device)
    rewards_NR = make_rewards(7, 1).to(device)
    advantage_N, *_ = op(rewards_NR, group_N, 2, None, "group", "sum", 1e-4, None, 0)
    assert advantage_N.isnan().tolist() == [False, True, False, True, False, False, True]
    kept = torch.tensor([0, 2, 4, 5], device=device)
    inside = op(rewards_NR[kept], group_N[kept], 2, None, "group", "sum", 1e-4, None, 0)[0]
    assert torch.equal(advantage_N[kept], inside)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    num_rewards=st.integers(1, 4),
    rule=st.sampled_from(RULES),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=40)
@pytest.mark.parametrize("impl", COMPILED)
def test_paths_agree(impl, sizes, num_rewards, rule, seed):
    group_N, rewards_NR = make_groups(sizes, seed), torch.rand(sum(sizes), num_rewards)
    arguments = (group_N, len(sizes), torch.rand(num_rewards), replace(rule, epsilon=0.1))
    result, reference = (run(rewards_NR, *arguments, path) for path in (impl, "reference"))
    for name, wanted in vars(reference).items():
        torch.testing.assert_close(getattr(result, name), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_it_is_what_numpy_says():
    """Flow-GRPO's arithmetic, once with its own library."""
    group_N, rewards_N = make_groups([9, 4]), make_rewards(13).double()
    result = group_advantage(rewards_N, group_N, 2)
    own = rewards_N[group_N == 1].numpy()
    advantage_M = (own - np.mean(own)) / (np.std(own) + 1e-4)
    np.testing.assert_allclose(result.advantage_N[group_N == 1].numpy(), advantage_M, rtol=1e-12)


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("normalize", ["sum", "each"])
def test_opcheck(normalize, impl, monkeypatch):
    monkeypatch.undo()  # opcheck compares fresh memory by itself
    import realign_kernels.group_advantage.cpp
    import realign_kernels.group_advantage.triton  # noqa: F401

    ops = torch.ops.realign_kernels
    op = {"cpp": ops.group_advantage, "triton": ops.group_advantage_triton}[impl].default
    device = device_of(impl)
    tensors = (make_rewards(9, 2).to(device), make_groups([4, 5]).to(device), 2, torch.ones(2, device=device))
    torch.library.opcheck(op, (*tensors, "group", normalize, 1e-4, None, 0))
    torch.library.opcheck(op, (*tensors[:3], None, "global", normalize, 1e-4, 5.0, 1))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("rewards_N", torch.zeros(2, 3, 4), r"rewards_N has shape \(2, 3, 4\): must be \[N\], or \[N, R\]"),
        ("rewards_N", torch.zeros(4, 0), r"rewards_N has shape \(4, 0\): must be \[N\], or \[N, R\]"),
        ("rewards_N", torch.zeros(4, dtype=torch.int64), "rewards_N has dtype torch.int64: must be float32"),
        ("group_N", torch.zeros(4), r"group_N is torch.float32 \(4,\): must be int64 \[4\], one number per"),
        ("group_N", torch.zeros(3, dtype=torch.int64), r"group_N is torch.int64 \(3,\): must be int64 \[4\]"),
        ("group_N", torch.zeros(4, dtype=torch.int64, device="meta"), "group_N is on meta: must be on cpu"),
        ("group_N", torch.tensor([0, 1, 2, 0]), r"group_N\[2\] is 2: must be from 0 to 1"),
        ("group_N", torch.tensor([0, -1, 1, 0]), r"group_N\[1\] is -1: must be from 0 to 1"),
        ("num_groups", 0, "num_groups is 0: must be at least 1 for 4 samples"),
        (
            "weights_R",
            torch.ones(2),
            r"weights_R is torch.float32 \(2,\): must be float32 \[1\], one number per",
        ),
        ("weights_R", torch.ones(1).double(), r"weights_R is torch.float64 \(1,\): must be float32 \[1\]"),
        ("rule", AdvantageRule(std="batch"), "rule.std is 'batch': must be one of group, global, none"),
        ("rule", AdvantageRule(normalize="all"), "rule.normalize is 'all': must be one of sum, each"),
        ("rule", AdvantageRule(epsilon=-1.0), "rule.epsilon is -1.0: must be finite and at least 0"),
        ("rule", AdvantageRule(clamp=0.0), "rule.clamp is 0.0: must be above 0, or None"),
        ("rule", AdvantageRule(correction=2), "rule.correction is 2: must be 0 or 1"),
        ("impl", "cuda", "group_advantage: impl is 'cuda': must be one of auto, reference, cpp, triton"),
    ],
)
def test_arguments(argument, value, message):
    arguments = {"rewards_N": torch.zeros(4), "group_N": torch.tensor([0, 1, 1, 0]), "num_groups": 2}
    with pytest.raises(ValueError, match=message):
        group_advantage(**{**arguments, argument: value})
