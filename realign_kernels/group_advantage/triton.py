"""`group_advantage` in Triton: one launch, one program per group.

A program lists its group's members, in their order, and sums along that list: the order of the sums depends
on nothing but the number of members. Each program reads all group numbers: the work is N times G, little for
the thousands of samples of one update.
N samples, R rewards of each, G groups, M members of one, K numbers of a sample that are normalised.
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
def load_groups(p_group, o_n, num_samples):
    """Group numbers; one beyond all groups where there is no sample."""
    return tl.load(p_group + o_n, mask=o_n < num_samples, other=1 << 62)


@triton.jit
def count_lower(p_group, i_g, num_samples, BN: tl.constexpr):
    """Samples of lower groups: where this group's place in the order begins."""
    num_lower = tl.zeros((BN,), tl.int32)
    for i in range(0, num_samples, BN):
        group = load_groups(p_group, i + tl.arange(0, BN), num_samples)
        num_lower += (group < i_g).to(tl.int32)
    return tl.sum(num_lower, axis=0)


@triton.jit
def list_members(p_group, p_order, p_advantage, i_g, start, num_samples, BN: tl.constexpr):
    """Write the group's members from `start` on, and say how many; the first also marks those of no group."""
    end = start
    for i in range(0, num_samples, BN):
        o_n = i + tl.arange(0, BN)
        group = load_groups(p_group, o_n, num_samples)
        is_member = (group == i_g).to(tl.int32)
        tl.store(p_order + end + tl.cumsum(is_member, axis=0) - 1, o_n, mask=is_member != 0)
        end += tl.sum(is_member, axis=0)
        is_lost = (i_g == 0) & (o_n < num_samples) & ((group < 0) | (group >= tl.num_programs(0)))
        tl.store(p_advantage + o_n, tl.full((BN,), float("nan"), tl.float32), mask=is_lost)
    return end - start


@triton.jit
def load_values(p_reward, p_weight, p_order, o_m, m_m, i_k, R: tl.constexpr, IS_SUM: tl.constexpr):
    """Numbers to normalise of members: a reward, or the weighted sum of all, from left to right."""
    o_n = o_m
    if p_order is not None:
        o_n = tl.load(p_order + o_m, mask=m_m, other=0)
    p_first = p_reward + o_n.to(tl.int64) * R
    if IS_SUM:
        value = load_weighted(p_first, p_weight, m_m, 0)
        for i_r in tl.static_range(1, R):
            value += load_weighted(p_first, p_weight, m_m, i_r)
    else:
        value = tl.load(p_first + i_k, mask=m_m, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_weighted(p_first, p_weight, m_m, i_r):
    """A reward of members, times its weight if there are weights."""
    value = tl.load(p_first + i_r, mask=m_m, other=0.0).to(tl.float32)
    if p_weight is not None:
        value *= tl.load(p_weight + i_r)
    return value


@triton.jit
def measure_values(
    p_reward, p_weight, p_order, count, i_k,
    R: tl.constexpr, IS_SUM: tl.constexpr, CORRECTION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Of `count` members: the first value, mean and deviation of the differences from it, how many differ."""
    o_m = tl.arange(0, BM)
    first = tl.sum(
        load_values(p_reward, p_weight, p_order, tl.arange(0, 1), count > 0, i_k, R, IS_SUM), axis=0
    )
    total = tl.zeros((BM,), tl.float32)
    num_different = tl.zeros((BM,), tl.int32)
    for i in range(0, count, BM):
        m_m = i + o_m < count
        value = load_values(p_reward, p_weight, p_order, i + o_m, m_m, i_k, R, IS_SUM)
        total += tl.where(m_m, value - first, 0.0)
        num_different += (m_m & (value != first)).to(tl.int32)
    mean_offset = tl.div_rn(tl.sum(total, axis=0), tl.maximum(count, 1).to(tl.float32))
    mean_offset = tl.where(count > 0, mean_offset, float("nan"))
    squares = tl.zeros((BM,), tl.float32)
    for i in range(0, count, BM):
        m_m = i + o_m < count
        value = load_values(p_reward, p_weight, p_order, i + o_m, m_m, i_k, R, IS_SUM)
        deviation = tl.where(m_m, value - first - mean_offset, 0.0)
        squares += deviation * deviation
    variance = tl.div_rn(tl.sum(squares, axis=0), tl.maximum(count - CORRECTION, 1).to(tl.float32))
    std = tl.where(count > 0, tl.sqrt_rn(variance), float("nan"))
    return first, mean_offset, std, tl.sum(num_different, axis=0)


@triton.jit
def clamp_values(x, bound):
    """Within [-bound, bound]; by comparisons, which a NaN passes."""
    return tl.where(x < -bound, -bound, tl.where(x > bound, bound, x))


@triton.jit(do_not_specialize=["num_samples"])  # one kernel for any number
def group_advantage_kernel(
    p_reward, p_weight, p_group, p_order, p_advantage, p_mean, p_std, p_degenerate,
    num_samples, epsilon, clamp,
    R: tl.constexpr, IS_SUM: tl.constexpr, STD: tl.constexpr, CORRECTION: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One group, column after column; an advantage grows in memory. STD as in `STD_CODES`."""
    K: tl.constexpr = 1 if IS_SUM else R
    i_g = tl.program_id(0)
    start = count_lower(p_group, i_g, num_samples, BN)
    count = list_members(p_group, p_order, p_advantage, i_g, start, num_samples, BN)
    tl.debug_barrier()
    p_order += start
    num_different = 0
    for i_k in range(K):
        first, mean_offset, std, num = measure_values(
            p_reward, p_weight, p_order, count, i_k, R, IS_SUM, CORRECTION, BM
        )
        num_different += num
        tl.store(p_mean + i_g.to(tl.int64) * K + i_k, first + mean_offset)
        tl.store(p_std + i_g.to(tl.int64) * K + i_k, std)
        if STD == 2:
            _, _, std, _ = measure_values(
                p_reward, p_weight, None, num_samples, i_k, R, IS_SUM, CORRECTION, BN
            )
        for i in range(0, count, BM):
            o_m = i + tl.arange(0, BM)
            value = load_values(p_reward, p_weight, p_order, o_m, o_m < count, i_k, R, IS_SUM)
            advantage = value - first - mean_offset
            if STD != 0:
                advantage = tl.div_rn(advantage, tl.zeros_like(advantage) + (std + epsilon))
            if not IS_SUM and p_weight is not None:
                advantage *= tl.load(p_weight + i_k)
            p_own = p_advantage + tl.load(p_order + o_m, mask=o_m < count, other=0)
            if K > 1:
                advantage += tl.load(p_own, mask=(o_m < count) & (i_k > 0), other=0.0)
            advantage = tl.where(i_k == K - 1, clamp_values(advantage, clamp), advantage)
            tl.store(p_own, advantage, mask=o_m < count)
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
    order_N = torch.empty(num_samples, dtype=torch.int32, device=rewards_NR.device)
    launch(
        group_advantage_kernel,
        (num_groups,),
        rewards_NR.contiguous(),
        None if weights_R is None else weights_R.contiguous(),
        group_N.contiguous(),
        order_N,
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
        num_warps=8,
        maxnreg=128,  # left to itself, ptxas aims at 48 and spills one
    )
    return outputs


@group_advantage_triton.register_fake
def _(rewards_NR, group_N, num_groups, weights_R, std, normalize, epsilon, clamp, correction):
    return allocate_outputs(rewards_NR, num_groups, normalize)
