"""Signature, formula, checks and dispatch of `group_advantage`. N samples, R rewards, G groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from realign_kernels.checks import can_read_values, check_choice, check_dtype
from realign_kernels.dispatch import choose_impl
from realign_kernels.group_advantage.reference import (
    AdvantageRule,
    GroupAdvantages,
    group_advantage_reference,
)

STDS = ("group", "global", "none")
NORMALIZES = ("sum", "each")


def group_advantage(
    rewards_N: Tensor,
    group_N: Tensor,
    num_groups: int,
    weights_R: Tensor | None = None,
    rule: AdvantageRule | None = None,
    impl: str = "auto",
) -> GroupAdvantages:
    """Advantages of samples over the others of their group: `(r - mean(group)) / (std + epsilon)`.

    Of several rewards r is the weighted sum, `r = sum_j w_j r_j`; or, with `normalize="each"`, the advantage
    is `sum_j w_j (r_j - mean_j(group)) / (std_j + epsilon)`. A group's results are the same bits whatever the
    other groups are and wherever its members lie, as long as their order is kept (but for `std="global"`). A
    reward that is not finite spoils its own group alone (with "global", all).

    Args:
        rewards_N: [N], or [N, R] for several rewards; float32, bfloat16, float16 or float64.
        group_N: int64 [N], each sample's group, from 0 to `num_groups - 1`, in any order. Not checked on a
            GPU: there a sample of no group gets NaN.
        num_groups: G. A group may have any number of members.
        weights_R: float32 [R]; None is 1 for all.
        rule: standard deviation, order of sum and normalisation, epsilon, clamp; None is `AdvantageRule()`.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: advantages, and of each group the mean, the standard deviation and whether it is degenerate. No
        gradient flows to the rewards.
    Raises: ValueError naming the argument and its value.
    Source: GRPO, arXiv 2402.03300, section 4.1.1; Flow-GRPO, arXiv 2505.05470, and `std="global"`, its code;
        `normalize="each"`: the advantage aggregation of MixGRPO's code, arXiv 2507.21802.
    """
    rule = rule or AdvantageRule()
    _check_rewards(rewards_N, group_N, num_groups, weights_R)
    _check_rule(rule)
    rewards_NR = rewards_N.detach() if rewards_N.dim() == 2 else rewards_N.detach().unsqueeze(1)
    weights_R = None if weights_R is None else weights_R.detach()
    path = choose_impl("group_advantage", impl, (rewards_NR, weights_R), {"cpp": False, "triton": False})
    arguments = (rewards_NR, group_N, num_groups, weights_R, rule)
    result = group_advantage_reference(*arguments) if path == "reference" else _run_native(path, *arguments)
    if rewards_N.dim() == 1 or rule.normalize == "sum":
        mean_G, std_G = result.mean_G.squeeze(1), result.std_G.squeeze(1)
        result = GroupAdvantages(result.advantage_N, mean_G, std_G, result.is_degenerate_G)
    return result


def _run_native(
    path: str,
    rewards_NR: Tensor,
    group_N: Tensor,
    num_groups: int,
    weights_R: Tensor | None,
    rule: AdvantageRule,
) -> GroupAdvantages:
    if path == "cpp":
        from realign_kernels.group_advantage.cpp import group_advantage_cpp as run
    else:
        from realign_kernels.group_advantage.triton import group_advantage_triton as run
    options = (rule.std, rule.normalize, rule.epsilon, rule.clamp, rule.correction)
    return GroupAdvantages(*run(rewards_NR, group_N, num_groups, weights_R, *options))


def _check_rewards(rewards_N: Tensor, group_N: Tensor, num_groups: int, weights_R: Tensor | None) -> None:
    if rewards_N.dim() not in (1, 2) or 0 in rewards_N.shape[1:]:
        raise ValueError(
            f"rewards_N has shape {tuple(rewards_N.shape)}: must be [N], or [N, R] for R rewards a sample"
        )
    check_dtype("rewards_N", rewards_N.dtype)
    least = min(len(rewards_N), 1)
    if num_groups < least:
        raise ValueError(f"num_groups is {num_groups}: must be at least {least} for {len(rewards_N)} samples")
    _check_numbers("group_N", group_N, torch.int64, len(rewards_N), "sample", rewards_N.device)
    if can_read_values(group_N) and len(group_N) > 0:
        low, high = (int(group) for group in group_N.aminmax())
        if low < 0 or high >= num_groups:
            sample = int(((group_N < 0) | (group_N >= num_groups)).nonzero()[0])
            raise ValueError(f"group_N[{sample}] is {group_N[sample]}: must be from 0 to {num_groups - 1}")
    if weights_R is not None:
        num_rewards = rewards_N.shape[1] if rewards_N.dim() == 2 else 1
        _check_numbers("weights_R", weights_R, torch.float32, num_rewards, "reward", rewards_N.device)


def _check_numbers(
    name: str, numbers: Tensor, dtype: torch.dtype, count: int, owner: str, device: torch.device
) -> None:
    if numbers.dtype != dtype or numbers.shape != (count,):
        raise ValueError(
            f"{name} is {numbers.dtype} {tuple(numbers.shape)}: "
            f"must be {str(dtype).removeprefix('torch.')} [{count}], one number per {owner}"
        )
    if numbers.device != device:
        raise ValueError(f"{name} is on {numbers.device}: must be on {device} with the rewards")


def _check_rule(rule: AdvantageRule) -> None:
    check_choice("rule.std", rule.std, STDS)
    check_choice("rule.normalize", rule.normalize, NORMALIZES)
    if not (math.isfinite(rule.epsilon) and rule.epsilon >= 0):
        raise ValueError(f"rule.epsilon is {rule.epsilon}: must be finite and at least 0")
    if rule.clamp is not None and not rule.clamp > 0:
        raise ValueError(f"rule.clamp is {rule.clamp}: must be above 0, or None for no bound")
    if rule.correction not in (0, 1):
        raise ValueError(f"rule.correction is {rule.correction}: must be 0 or 1")
