"""Definition of `group_advantage` in plain torch.

N rewarded samples, R rewards of each, G groups, M members of one group, K numbers that are normalised: the
weighted sum of the rewards (K = 1), or each reward (K = R).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdvantageRule:
    """How rewards become advantages. The defaults are Flow-GRPO's with `global_std` off.

    Attributes:
        std: what deviations from the group's mean are divided by: the standard deviation of the "group", that
            of all rewards ("global"), or nothing ("none").
        normalize: of several rewards, the weighted "sum" is normalised, or "each", before the weighted sum.
        epsilon: added to the standard deviation.
        clamp: advantages end in [-clamp, clamp]; None is no bound.
        correction: the sum of squares is divided by the count less this: 0 (population) or 1 (sample).
    """

    std: str = "group"
    normalize: str = "sum"
    epsilon: float = 1e-4
    clamp: float | None = None
    correction: int = 0


@dataclass(frozen=True, eq=False)
class GroupAdvantages:
    """What `group_advantage` returns, float32 (float64 for float64 rewards).

    Attributes:
        advantage_N: one number per sample.
        mean_G, std_G: of what is normalised, over each group, whatever the advantage was divided by; [G], or
            [G, R] where each of several rewards is. NaN for a group without members.
        is_degenerate_G: bool [G], all that is normalised is equal within the group, which then teaches
            nothing. Also with one member or none.
    """

    advantage_N: Tensor
    mean_G: Tensor
    std_G: Tensor
    is_degenerate_G: Tensor


def group_advantage_reference(
    rewards_NR: Tensor, group_N: Tensor, num_groups: int, weights_R: Tensor | None, rule: AdvantageRule
) -> GroupAdvantages:
    """Group by group, in float32 (float64 stays float64); `mean_G` and `std_G` are [G, K]."""
    value_NK, weights_K = _weigh(rewards_NR, weights_R, rule)
    *_, global_std_K = _normalize(value_NK, rule.correction)
    advantage_N = value_NK.new_full((len(value_NK),), math.nan)
    mean_GK, std_GK = (value_NK.new_empty(num_groups, value_NK.shape[1]) for _ in range(2))
    is_degenerate_G = torch.empty(num_groups, dtype=torch.bool, device=value_NK.device)
    for group in range(num_groups):
        is_member_N = group_N == group
        value_MK = value_NK[is_member_N]
        deviation_MK, mean_GK[group], std_GK[group] = _normalize(value_MK, rule.correction)
        if rule.std != "none":
            std_K = global_std_K if rule.std == "global" else std_GK[group]
            deviation_MK = deviation_MK / (std_K + rule.epsilon)
        advantage_N[is_member_N] = _add_columns(deviation_MK * weights_K)
        is_degenerate_G[group] = (value_MK == value_MK[:1]).all()
    if rule.clamp is not None:
        advantage_N = advantage_N.clamp(-rule.clamp, rule.clamp)
    return GroupAdvantages(advantage_N, mean_GK, std_GK, is_degenerate_G)


def _weigh(
    rewards_NR: Tensor, weights_R: Tensor | None, rule: AdvantageRule
) -> tuple[Tensor, Tensor | float]:
    """What is normalised, [N, K], and the weights of the columns once they are."""
    rewards_NR = rewards_NR.to(torch.promote_types(rewards_NR.dtype, torch.float32))
    weights = 1.0 if weights_R is None else weights_R.to(rewards_NR.dtype)
    if rule.normalize == "each":
        return rewards_NR, weights
    return _add_columns(rewards_NR * weights).unsqueeze(1), 1.0


def _add_columns(x_NK: Tensor) -> Tensor:
    """From left to right: a row's bits are its own."""
    total_N = x_NK[:, 0]
    for column in range(1, x_NK.shape[1]):
        total_N = total_N + x_NK[:, column]
    return total_N


def _normalize(value_MK: Tensor, correction: int) -> tuple[Tensor, Tensor, Tensor]:
    """Deviations from the mean, [M, K], mean and standard deviation, [K]; NaN without members.

    Sums run over differences from the first member: equal values have exactly themselves as mean, and exactly
    0 as deviation. One member has the deviation 0 whatever the correction.
    """
    if len(value_MK) == 0:
        nan_K = value_MK.new_full(value_MK.shape[1:], math.nan)
        return value_MK, nan_K, nan_K
    first_K = value_MK[0]
    offset_MK = value_MK - first_K
    mean_offset_K = offset_MK.mean(dim=0)
    deviation_MK = offset_MK - mean_offset_K
    variance_K = deviation_MK.square().sum(dim=0) / max(len(value_MK) - correction, 1)
    return deviation_MK, first_K + mean_offset_K, variance_K.sqrt()
