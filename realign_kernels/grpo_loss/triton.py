"""Triton path of `grpo_loss`. Forward makes the gradients too; backward multiplies them by the incoming one.

One launch over the entries; before it, where there is a KL, one over tiles of the velocities, which sums
squares and writes the gradient. Backward scales that gradient in place, and touches nothing where it is to be
multiplied by 1.
N entries, L packed tokens, C channels, P tiles.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.grpo_loss.reference import GrpoMetrics, RatioGuard, VelocityKL
from realign_kernels.launch import launch
from realign_kernels.tiles import (
    count_tiles,
    find_tile,
    load_number,
    load_wide,
    num_programs,
    tile_constants,
    tile_offsets,
)

LOG2_E = tl.constexpr(1 / math.log(2))
# ln 2 in two parts; the first has 16 bits, so that it times an exponent is exact.
LN2_HIGH = tl.constexpr(45426 / 65536)
LN2_LOW = tl.constexpr(math.log(2) - 45426 / 65536)
BLOCK_ENTRIES, BLOCK_ENTRIES_KL, BLOCK_TILES = 256, 128, 16
# Tiles are this many times as long as those of other ops, so that few sums are left to one program.
TILE_FACTOR = 4
BLOCK_SCALE, MAX_PROGRAMS = 4096, 1024
METRICS = (
    "policy_loss",
    "approx_kl",
    "ratio_mean",
    "ratio_max",
    "ratio_min",
    "clip_fraction_high",
    "clip_fraction_low",
    "kl_mean",
)


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
    else:
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


@triton.jit(do_not_specialize=["num_entries"])
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


@triton.jit(do_not_specialize=["num_entries"])
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


def run_grpo_loss(
    log_probs: tuple[Tensor, Tensor],
    advantage_N: Tensor,
    clip: tuple[float, float],
    guard: RatioGuard,
    kl: VelocityKL | None,
    weight_N: Tensor | None,
    denominator: float,
) -> tuple[Tensor, GrpoMetrics]:
    """The arguments of the reference to those of the op, and its results to those of the reference."""
    records = (log_probs[1], advantage_N, guard.scale_N, guard.weight_N, weight_N)
    velocity_LC, beta = None, 0.0
    if kl is not None:
        velocity_LC, beta = kl.velocity_LC, kl.beta
        records = (*records, kl.reference_LC, kl.cu_seqlens, kl.weight_N)
    has_grad = velocity_LC is not None and velocity_LC.requires_grad and torch.is_grad_enabled()
    numbers = (1.0 - clip[0], 1.0 + clip[1], beta, denominator, has_grad)
    results = _GrpoLoss.apply(log_probs[0], guard.bias_N, velocity_LC, records, numbers)
    loss, metrics_M, ratio_N, kl_N = results
    metrics = dict(zip(METRICS, metrics_M.unbind(), strict=True))
    if kl is None:
        metrics["kl_mean"] = None
    return loss, GrpoMetrics(**metrics, ratio_N=ratio_N, kl_N=None if kl is None else kl_N)


class _GrpoLoss(torch.autograd.Function):
    """Keeps the gradients that the forward pass made."""

    @staticmethod
    def forward(
        ctx,
        logprob_N: Tensor,
        bias_N: Tensor | None,
        velocity_LC: Tensor | None,
        records: tuple[Tensor | None, ...],
        numbers: tuple[float, float, float, float, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        old_N, advantage_N, scale_N, guard_weight_N, weight_N, *kl = records
        entries = (logprob_N, old_N, advantage_N, bias_N, scale_N, guard_weight_N, weight_N)
        *results, grad_N, grad_LC = grpo_loss_triton(*entries, velocity_LC, *(kl or (None,) * 3), *numbers)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_N, grad_LC)
        ctx.dtypes = [None if x is None else x.dtype for x in (logprob_N, bias_N, velocity_LC)]
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor, *_) -> tuple[Tensor | None, ...]:
        grad_N, grad_LC = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            scale_gradients_triton(grad_LC, grad_N, grad_loss)
        else:
            grad_N = grad_N * grad_loss
        grads = zip((grad_N, grad_N, grad_LC), ctx.dtypes, ctx.needs_input_grad, strict=False)
        return (*(grad.to(dtype) if is_needed else None for grad, dtype, is_needed in grads), None, None)


@torch.library.custom_op(
    "realign_kernels::grpo_loss_triton",
    mutates_args=(),
    schema="(Tensor logprob, Tensor old, Tensor advantage, Tensor? bias, Tensor? scale, "
    "Tensor? guard_weight, Tensor? weight, Tensor? velocity, Tensor? reference, Tensor? cu_seqlens, "
    "Tensor? kl_weight, float low, float high, float beta, float denominator, bool has_velocity_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def grpo_loss_triton(
    logprob: Tensor,
    old: Tensor,
    advantage: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    guard_weight: Tensor | None,
    weight: Tensor | None,
    velocity: Tensor | None,
    reference: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_weight: Tensor | None,
    low: float,
    high: float,
    beta: float,
    denominator: float,
    has_velocity_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, ratios, KLs, gradients to log-probs and to the velocity; [0] where there is none."""
    outputs = _allocate_outputs(logprob, velocity, has_velocity_grad)
    loss, metrics_M, ratio_N, kl_N, grad_N, grad_LC = outputs
    sums_P, constants = None, {"C": 0, "BT": 1}
    if velocity is not None:
        tensors = (velocity, reference, cu_seqlens, kl_weight, weight)
        grad_scale = 2.0 * beta / denominator
        sums_P, constants = _launch_kl(tensors, grad_LC if has_velocity_grad else None, grad_scale)
    inputs = (logprob, old, advantage, bias, scale, guard_weight, weight, sums_P, cu_seqlens, kl_weight)
    launch(
        grpo_loss_kernel,
        (1,),
        *_make_contiguous(inputs),
        *(loss, metrics_M, ratio_N, grad_N, kl_N if velocity is not None else None),
        *(logprob.numel(), low, high, beta, denominator),
        **constants,
        BN=BLOCK_ENTRIES if velocity is None else BLOCK_ENTRIES_KL,
        BP=BLOCK_TILES,
        num_warps=4 if velocity is None else 8,
    )
    return outputs


def _launch_kl(
    tensors: tuple[Tensor | None, ...], grad_LC: Tensor | None, grad_scale: float
) -> tuple[Tensor, dict[str, int]]:
    """Sums of squares [P] of the velocities' tiles, and the constants that say where an entry's are."""
    velocity_LC, _, cu_seqlens, *_ = tensors
    constants = tile_constants(velocity_LC.shape[1], cu_seqlens)
    constants["BT"] *= TILE_FACTOR
    num_entries = cu_seqlens.numel() - 1
    num_tiles = num_programs(velocity_LC.shape[0], num_entries, constants["BT"])
    sums_P = torch.empty(num_tiles, dtype=torch.float32, device=velocity_LC.device)
    arguments = (*_make_contiguous(tensors), sums_P, grad_LC, num_entries, grad_scale)
    launch(velocity_kl_kernel, (num_tiles,), *arguments, **constants, num_warps=8)
    return sums_P, {"C": constants["C"], "BT": constants["BT"]}


def _allocate_outputs(
    logprob_N: Tensor, velocity_LC: Tensor | None, has_velocity_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Empty tensors for what is not asked."""
    num_entries, device = logprob_N.numel(), logprob_N.device
    sizes = (
        (),
        (len(METRICS),),
        (num_entries,),
        (num_entries if velocity_LC is not None else 0,),
        (num_entries,),
    )
    outputs = tuple(torch.empty(size, dtype=torch.float32, device=device) for size in sizes)
    if not has_velocity_grad:
        return (*outputs, torch.empty(0, device=device))
    # float16 has no room for a gradient that a loss scale has yet to enlarge.
    dtype = torch.float32 if velocity_LC.dtype == torch.float16 else velocity_LC.dtype
    return (*outputs, torch.empty(velocity_LC.shape, dtype=dtype, device=device))


def _make_contiguous(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@torch.library.custom_op(
    "realign_kernels::scale_gradients_triton",
    mutates_args=("velocity_grad", "grad"),
    schema="(Tensor(a!) velocity_grad, Tensor(b!) grad, Tensor factor) -> ()",
)
def scale_gradients_triton(velocity_grad: Tensor, grad: Tensor, factor: Tensor) -> None:
    """Multiply contiguous gradients by a number, in place."""
    num_numbers = velocity_grad.numel()
    grid = (min(max(triton.cdiv(num_numbers, BLOCK_SCALE), 1), MAX_PROGRAMS),)
    launch(scale_kernel, grid, velocity_grad, grad, factor, num_numbers, grad.numel(), BL=BLOCK_SCALE)


@grpo_loss_triton.register_fake
def _(logprob, old, advantage, bias, scale, guard_weight, weight, velocity, *rest):
    return _allocate_outputs(logprob, velocity, rest[-1])
