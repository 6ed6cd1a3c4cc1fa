"""`group_advantage` in Triton: one launch, one program per group.

A program finds its group's members among all, moves their values to a place of their own, in their order, and
sums from there: the order of the sums depends on nothing but the number of members. Each program reads all
group numbers: the work is N times G, little for the thousands of samples of one update.
N samples, R rewards of each, G groups, K numbers of a sample that are normalised.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.group_advantage.outputs import SCHEMA, STD_CODES, allocate_outputs
from realign_kernels.launch import launch

BLOCK_SAMPLES, BLOCK_MEMBERS = 1024, 64


@triton.jit
def load_values(p_reward, p_weight, o_n, m_n, i_k, R: tl.constexpr, IS_SUM: tl.constexpr):
    """Numbers to normalise of some samples: a reward, or the weighted sum of all, from left to right."""
    p_first = p_reward + o_n.to(tl.int64) * R
    if IS_SUM:
        value = load_weighted(p_first, p_weight, m_n, 0)
        for i_r in tl.static_range(1, R):
            value += load_weighted(p_first, p_weight, m_n, i_r)
    else:
        value = tl.load(p_first + i_k, mask=m_n, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_weighted(p_first, p_weight, m_n, i_r):
    """A reward of some samples, times its weight if there are weights."""
    value = tl.load(p_first + i_r, mask=m_n, other=0.0).to(tl.float32)
    if p_weight is not None:
        value *= tl.load(p_weight + i_r)
    return value


@triton.jit
def measure_values(
    p_reward, p_weight, start, count, i_k,
    R: tl.constexpr, IS_SUM: tl.constexpr, CORRECTION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Of `count` samples: the first value, mean and deviation of the differences from it, how many differ."""
    first = tl.sum(
        load_values(p_reward, p_weight, start + tl.arange(0, 1), count > 0, i_k, R, IS_SUM), axis=0
    )
    total = tl.zeros((BN,), tl.float32)
    num_different = tl.zeros((BN,), tl.int32)
    for i in range(0, count, BN):
        o_n = i + tl.arange(0, BN)
        value = load_values(p_reward, p_weight, start + o_n, o_n < count, i_k, R, IS_SUM)
        total += tl.where(o_n < count, value - first, 0.0)
        num_different += ((o_n < count) & (value != first)).to(tl.int32)
    mean_offset = tl.div_rn(tl.sum(total, axis=0), tl.maximum(count, 1).to(tl.float32))
    mean_offset = tl.where(count > 0, mean_offset, float("nan"))
    squares = tl.zeros((BN,), tl.float32)
    for i in range(0, count, BN):
        o_n = i + tl.arange(0, BN)
        value = load_values(p_reward, p_weight, start + o_n, o_n < count, i_k, R, IS_SUM)
        deviation = tl.where(o_n < count, value - first - mean_offset, 0.0)
        squares += deviation * deviation
    variance = tl.div_rn(tl.sum(squares, axis=0), tl.maximum(count - CORRECTION, 1).to(tl.float32))
    std = tl.where(count > 0, tl.sqrt_rn(variance), float("nan"))
    return first, mean_offset, std, tl.sum(num_different, axis=0)


@triton.jit
def load_groups(p_group, o_n, num_samples):
    """Group numbers; one beyond all groups where there is no sample."""
    return tl.load(p_group + o_n, mask=o_n < num_samples, other=1 << 62)


@triton.jit
def move_members(
    p_reward, p_weight, p_group, p_moved, i_g, i_k, num_samples,
    R: tl.constexpr, IS_SUM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Put the values of a group's members, in their order, behind those of lower groups; where, how many."""
    num_lower = tl.zeros((BN,), tl.int32)
    for i in range(0, num_samples, BN):
        group = load_groups(p_group, i + tl.arange(0, BN), num_samples)
        num_lower += (group < i_g).to(tl.int32)
    start = tl.sum(num_lower, axis=0)
    end = start
    for i in range(0, num_samples, BN):
        o_n = i + tl.arange(0, BN)
        is_member = load_groups(p_group, o_n, num_samples) == i_g
        value = load_values(p_reward, p_weight, o_n, is_member, i_k, R, IS_SUM)
        tl.store(p_moved + end + tl.cumsum(is_member.to(tl.int32), axis=0) - 1, value, mask=is_member)
        end += tl.sum(is_member.to(tl.int32), axis=0)
    return start, end - start


@triton.jit
def clamp_values(x, bound):
    """Within [-bound, bound]; by comparisons, which a NaN passes."""
    return tl.where(x < -bound, -bound, tl.where(x > bound, bound, x))


@triton.jit
def group_advantage_kernel(
    p_reward, p_weight, p_group, p_moved, p_advantage, p_mean, p_std, p_degenerate,
    num_samples, epsilon, clamp,
    R: tl.constexpr, IS_SUM: tl.constexpr, STD: tl.constexpr, CORRECTION: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One group, column after column; an advantage grows in memory. STD as in `STD_CODES`."""
    K: tl.constexpr = 1 if IS_SUM else R
    i_g = tl.program_id(0).to(tl.int64)
    num_different = 0
    for i_k in tl.static_range(K):
        start, count = move_members(
            p_reward, p_weight, p_group, p_moved, i_g, i_k, num_samples, R, IS_SUM, BN
        )
        tl.debug_barrier()
        first, mean_offset, std, num = measure_values(
            p_moved, None, start, count, 0, 1, False, CORRECTION, BM
        )
        num_different += num
        tl.store(p_mean + i_g * K + i_k, first + mean_offset)
        tl.store(p_std + i_g * K + i_k, std)
        if STD == 2:
            _, _, std, _ = measure_values(p_reward, p_weight, 0, num_samples, i_k, R, IS_SUM, CORRECTION, BN)
        for i in range(0, num_samples, BN):
            o_n = i + tl.arange(0, BN)
            group = load_groups(p_group, o_n, num_samples)
            is_member = group == i_g
            advantage = load_values(p_reward, p_weight, o_n, is_member, i_k, R, IS_SUM) - first - mean_offset
            if STD != 0:
                advantage = tl.div_rn(advantage, tl.zeros_like(advantage) + (std + epsilon))
            if not IS_SUM and p_weight is not None:
                advantage *= tl.load(p_weight + i_k)
            if i_k > 0:
                advantage += tl.load(p_advantage + o_n, mask=is_member, other=0.0)
            if i_k == K - 1:
                advantage = clamp_values(advantage, clamp)
            # The first program also marks samples that are in no group.
            is_lost = (i_g == 0) & (o_n < num_samples) & ((group < 0) | (group >= tl.num_programs(0)))
            advantage = tl.where(is_lost, float("nan"), advantage)
            tl.store(p_advantage + o_n, advantage, mask=is_member | is_lost)
        tl.debug_barrier()
    tl.store(p_degenerate + i_g, num_different == 0)


@torch.library.custom_op("realign_kernels::group_advantage_triton", mutates_args=(), schema=SCHEMA)
def group_advantage_triton(
    rewards_NR: Tensor,
    group_N: Tensor,
    num_groups: int,
    weights_R: Tensor | None,
    std: str,
    normalize: str,
    epsilon: float,
    clamp: float | None,
    correction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`group_advantage` on a GPU: advantages, means, standard deviations, which are degenerate."""
    outputs = allocate_outputs(rewards_NR, num_groups, normalize)
    num_samples, num_rewards = rewards_NR.shape
    moved_N = torch.empty(num_samples, dtype=torch.float32, device=rewards_NR.device)
    launch(
        group_advantage_kernel,
        (num_groups,),
        rewards_NR.contiguous(),
        None if weights_R is None else weights_R.contiguous(),
        group_N.contiguous(),
        moved_N,
        *outputs,
        num_samples,
        epsilon,
        math.inf if clamp is None else clamp,
        R=num_rewards,
        IS_SUM=normalize == "sum",
        STD=STD_CODES[std],
        CORRECTION=correction,
        BN=BLOCK_SAMPLES,
        BM=BLOCK_MEMBERS,
    )
    return outputs


@group_advantage_triton.register_fake
def _(rewards_NR, group_N, num_groups, weights_R, std, normalize, epsilon, clamp, correction):
    return allocate_outputs(rewards_NR, num_groups, normalize)
