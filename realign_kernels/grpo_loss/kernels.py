"""Triton kernels of `grpo_loss`. N entries, L packed tokens, C channels."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from realign_kernels.tiles import count_tiles, find_tile, load_number, load_wide, tile_offsets

LOG2_E = tl.constexpr(1 / math.log(2))
# ln 2 in two parts; the first has 16 bits, so that it times an exponent is exact.
LN2_HIGH = tl.constexpr(45426 / 65536)
LN2_LOW = tl.constexpr(math.log(2) - 45426 / 65536)


@triton.jit
def exp_exact(x):
    """exp within a unit in the last place. The chip's own is off by two: much of a clip range of 1e-6."""
    bounded = tl.where(x > 100.0, 100.0, tl.where(x < -110.0, -110.0, x))
    exponent = tl.floor(bounded * LOG2_E + 0.5)
    rest = bounded - exponent * LN2_HIGH - exponent * LN2_LOW
    # Taylor's series, for which |rest| <= ln(2) / 2 needs seven terms.
    series = rest * (1 / 5040) + 1 / 720
    series = series * rest + 1 / 120
    series = series * rest + 1 / 24
    series = series * rest + 1 / 6
    series = series * rest + 0.5
    mantissa = (series * rest * rest + rest) + 1.0
    exponent = tl.where(x == x, exponent, 0.0).to(tl.int32)
    # Two factors: each is a normal number, and the second product alone rounds, to 0 or to infinity.
    return mantissa * power_of_two(exponent >> 1) * power_of_two(exponent - (exponent >> 1))


@triton.jit
def power_of_two(exponent):
    """2 to an integer between -126 and 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_entries(pointer, o_n, m_n, default: tl.constexpr):
    """Numbers of entries as float32, or the default where no tensor is given."""
    if pointer is not None:
        return load_wide(pointer, o_n, m_n)
    return tl.full(o_n.shape, default, tl.float32)


@triton.jit
def clip_surrogate(ratio, advantage, low, high):
    """The larger of the free and the clipped surrogate, and its slope: at a tie, as torch, half of each."""
    free = -advantage * ratio
    clipped = -advantage * tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    surrogate = tl.where((free > clipped) | (free != free), free, clipped)
    share = tl.where(free > clipped, 1.0, tl.where(free == clipped, 0.5, 0.0))
    is_inside = (ratio >= low) & (ratio <= high)
    return surrogate, -advantage * (share + tl.where(is_inside, 1.0 - share, 0.0))


@triton.jit
def mean_squares(p_sums, p_cu_seqlens, o_n, m_n, C: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr):
    """Of each entry, from the sums of its tiles, added in their order."""
    start = tl.load(p_cu_seqlens + o_n, mask=m_n, other=0)
    end = tl.load(p_cu_seqlens + o_n + 1, mask=m_n, other=0)
    first_tile = start // BT + o_n
    num_tiles = tl.where(m_n, count_tiles(start, end, BT), 0)
    total = tl.zeros((o_n.shape[0], BP), tl.float32)
    for i in range(0, tl.max(num_tiles, axis=0), BP):
        o_p = i + tl.arange(0, BP)[None, :]
        total += tl.load(p_sums + first_tile[:, None] + o_p, mask=o_p < num_tiles[:, None], other=0.0)
    count = tl.maximum((end - start).to(tl.int64) * C, 1).to(tl.float32)
    return tl.div_rn(tl.sum(total, axis=1), count)


@triton.jit(do_not_specialize=["num_entries"])
def velocity_kl_kernel(
    p_velocity, p_reference, p_cu_seqlens, p_kl_weight, p_weight, p_sums, p_grad, num_entries, grad_scale,
    C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """One tile: its sum of squares, and the gradient of the loss to it, if asked."""
    i_tile = tl.program_id(0)
    i_n, _, token, start, end = find_tile(p_cu_seqlens, i_tile, num_entries, BT, BB)
    offsets, mask = tile_offsets(token, end, C, BC, BT)
    difference = load_wide(p_velocity, offsets, mask) - load_wide(p_reference, offsets, mask)
    tl.store(p_sums + i_tile, tl.sum(difference * difference))
    if p_grad is not None:
        count = tl.maximum((end - start).to(tl.int64) * C, 1).to(tl.float32)
        scale = grad_scale * load_number(p_kl_weight, i_n, 1.0) * load_number(p_weight, i_n, 1.0)
        grad = tl.div_rn(scale, count) * difference
        tl.store(p_grad + offsets, grad.to(p_grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_entries"])  # one kernel for any number
def grpo_loss_kernel(
    p_logprob, p_old, p_advantage, p_bias, p_scale, p_guard_weight, p_weight,
    p_sums, p_cu_seqlens, p_kl_weight, p_loss, p_metrics, p_ratio, p_grad, p_kl,
    num_entries, low, high, beta, denominator,
    C: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """All entries, in one program."""
    loss = tl.zeros((BN,), tl.float32)
    policy_loss, squares, ratios, num_high, num_low, kls = loss, loss, loss, loss, loss, loss
    largest, smallest = loss + float("-inf"), loss + float("inf")
    for i in range(0, num_entries, BN):
        o_n = i + tl.arange(0, BN)
        m_n = o_n < num_entries
        difference = load_wide(p_logprob, o_n, m_n) - load_wide(p_old, o_n, m_n)
        scale = load_entries(p_scale, o_n, m_n, 1.0)
        ratio = exp_exact((difference + load_entries(p_bias, o_n, m_n, 0.0)) * scale)
        policy, slope = clip_surrogate(ratio, load_wide(p_advantage, o_n, m_n), low, high)
        guard_weight = load_entries(p_guard_weight, o_n, m_n, 1.0)
        weight = load_entries(p_weight, o_n, m_n, 1.0)
        policy *= guard_weight
        grad = tl.div_rn(weight, tl.zeros_like(weight) + denominator) * guard_weight * slope * ratio * scale
        tl.store(p_ratio + o_n, ratio, mask=m_n)
        tl.store(p_grad + o_n, grad, mask=m_n)
        policy_loss += tl.where(m_n, policy * weight, 0.0)
        if p_sums is not None:
            kl = mean_squares(p_sums, p_cu_seqlens, o_n, m_n, C, BT, BP) * load_entries(
                p_kl_weight, o_n, m_n, 1.0
            )
            tl.store(p_kl + o_n, kl, mask=m_n)
            kls += tl.where(m_n, kl, 0.0)
            policy += beta * kl
        loss += tl.where(m_n, policy * weight, 0.0)
        squares += tl.where(m_n, difference * difference, 0.0)
        ratios += tl.where(m_n, ratio, 0.0)
        largest = tl.maximum(largest, tl.where(m_n, ratio, float("-inf")))
        smallest = tl.minimum(smallest, tl.where(m_n, ratio, float("inf")))
        num_high += (m_n & (ratio > high)).to(tl.float32)
        num_low += (m_n & (ratio < low)).to(tl.float32)
    tl.store(p_loss, mean_of(loss, denominator))
    tl.store(p_metrics, mean_of(policy_loss, denominator))
    tl.store(p_metrics + 1, 0.5 * mean_of(squares, num_entries))
    ratio_mean = mean_of(ratios, num_entries)
    is_number = ratio_mean == ratio_mean
    tl.store(p_metrics + 2, ratio_mean)
    tl.store(p_metrics + 3, tl.where(is_number, tl.max(largest, axis=0), float("nan")))
    tl.store(p_metrics + 4, tl.where(is_number, tl.min(smallest, axis=0), float("nan")))
    tl.store(p_metrics + 5, mean_of(num_high, num_entries))
    tl.store(p_metrics + 6, mean_of(num_low, num_entries))
    tl.store(p_metrics + 7, mean_of(kls, num_entries))


@triton.jit
def mean_of(x, count):
    """The sum over a count, which may be 0."""
    return tl.div_rn(tl.sum(x, axis=0), tl.full((), 0.0, tl.float32) + count)


@triton.jit
def scale_kernel(p_velocity_grad, p_grad, p_factor, num_numbers, num_entries, BL: tl.constexpr):
    """Multiply both in place; nothing is read or written where the factor is 1."""
    factor = tl.load(p_factor)
    if factor != 1.0:
        i_program = tl.program_id(0).to(tl.int64)
        for i in range(i_program * BL, num_numbers, tl.num_programs(0) * BL):
            scale_numbers(p_velocity_grad, i + tl.arange(0, BL), num_numbers, factor)
        if i_program == 0:
            for i_n in range(0, num_entries, BL):
                scale_numbers(p_grad, i_n + tl.arange(0, BL), num_entries, factor)


@triton.jit
def scale_numbers(pointer, offsets, count, factor):
    """A block of numbers, in place."""
    scaled = load_wide(pointer, offsets, offsets < count) * factor
    tl.store(pointer + offsets, scaled.to(pointer.dtype.element_ty), mask=offsets < count)
