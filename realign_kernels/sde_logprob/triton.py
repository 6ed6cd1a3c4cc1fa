"""Triton path of `sde_logprob`: one launch forward, one backward.

The tiles, and the order in which their sums are added, are those of `guided_flow_step`: so are the bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.guided_flow_step.triton import reduce_errors
from realign_kernels.launch import launch
from realign_kernels.tiles import (
    count_tiles,
    find_tile,
    is_last_program,
    load_wide,
    num_programs,
    tile_constants,
    tile_offsets,
)


@triton.jit(do_not_specialize=["num_samples", "num_programs"])
def sde_logprob_kernel(
    p_sample,
    p_velocity,
    p_next,
    p_old,
    p_cu_seqlens,
    p_a,
    p_b,
    p_weight,
    p_constant,
    p_bias_weight,
    p_sums,
    p_counters,
    p_logprob,
    p_bias,
    num_samples,
    num_programs,
    C: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    BB: tl.constexpr,
    REDUCE_SUM: tl.constexpr,
):
    i_tile = tl.program_id(0)
    i_b, first_tile, token, start, end = find_tile(p_cu_seqlens, i_tile, num_samples, BT, BB)
    num_tiles = count_tiles(start, end, BT)
    if i_tile < first_tile + num_tiles:
        offsets, mask = tile_offsets(token, end, C, BC, BT)
        a, b = tl.load(p_a + i_b), tl.load(p_b + i_b)
        velocity = load_wide(p_velocity, offsets, mask)
        mean = a * load_wide(p_sample, offsets, mask) + b * velocity
        error = tl.where(mask, load_wide(p_next, offsets, mask) - mean, 0.0)
        tl.store(p_sums + i_tile, tl.sum(error * error))
        if p_old is not None:
            moved = b * (velocity - load_wide(p_old, offsets, mask))
            tl.store(p_sums + num_programs + i_tile, tl.sum(moved * moved))
        if is_last_program(p_counters, i_b, num_tiles):
            reduced = reduce_errors(p_sums, first_tile, start, end, num_tiles, C, REDUCE_SUM)
            weight, constant = tl.load(p_weight + i_b), tl.load(p_constant + i_b)
            tl.store(p_logprob + i_b, constant - weight * reduced)
            if p_old is not None:
                p_moved = p_sums + num_programs
                reduced = reduce_errors(p_moved, first_tile, start, end, num_tiles, C, REDUCE_SUM)
                tl.store(p_bias + i_b, tl.load(p_bias_weight + i_b) * reduced)


@triton.jit(do_not_specialize=["num_samples"])
def sde_logprob_backward_kernel(
    p_sample,
    p_velocity,
    p_next,
    p_old,
    p_cu_seqlens,
    p_a,
    p_b,
    p_weight,
    p_bias_weight,
    p_grad_logprob,
    p_grad_bias,
    p_grad,
    num_samples,
    C: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    BB: tl.constexpr,
    REDUCE_SUM: tl.constexpr,
):
    i_b, _, token, start, end = find_tile(p_cu_seqlens, tl.program_id(0), num_samples, BT, BB)
    offsets, mask = tile_offsets(token, end, C, BC, BT)
    a, b = tl.load(p_a + i_b), tl.load(p_b + i_b)
    scale = 2.0 * b
    if not REDUCE_SUM:
        count = tl.maximum((end - start).to(tl.int64) * C, 1)
        scale = tl.div_rn(scale, count.to(tl.float32))
    velocity = load_wide(p_velocity, offsets, mask)
    mean = a * load_wide(p_sample, offsets, mask) + b * velocity
    error = load_wide(p_next, offsets, mask) - mean
    grad = (scale * tl.load(p_weight + i_b) * tl.load(p_grad_logprob + i_b)) * error
    if p_old is not None:
        moved = b * (velocity - load_wide(p_old, offsets, mask))
        grad += (scale * tl.load(p_bias_weight + i_b) * tl.load(p_grad_bias + i_b)) * moved
    tl.store(p_grad + offsets, grad.to(p_grad.dtype.element_ty), mask=mask)


_STEP = "Tensor sample, Tensor velocity, Tensor next_sample, Tensor cu_seqlens, Tensor a, Tensor b"


@torch.library.custom_op(
    "realign_kernels::sde_logprob_triton",
    mutates_args=(),
    schema=f"({_STEP}, Tensor weight, Tensor constant, bool reduce_sum, Tensor? old_velocity, "
    "Tensor? bias_weight) -> (Tensor, Tensor)",
)
def sde_logprob_triton(
    sample: Tensor,
    velocity: Tensor,
    next_sample: Tensor,
    cu_seqlens: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    constant: Tensor,
    reduce_sum: bool,
    old_velocity: Tensor | None,
    bias_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Log-probs [B], and biases [B], or [0] without an old velocity."""
    num_samples, device = cu_seqlens.numel() - 1, velocity.device
    if velocity.numel() == 0:
        return constant.clone(), torch.zeros(0 if old_velocity is None else num_samples, device=device)
    logprob_B = torch.empty(num_samples, device=device)
    bias_B = torch.empty(0 if old_velocity is None else num_samples, device=device)
    constants = tile_constants(velocity.shape[1], cu_seqlens)
    num_tiles = num_programs(velocity.shape[0], num_samples, constants["BT"])
    sums = torch.empty(2 * num_tiles, device=device)
    counters = torch.zeros(num_samples, dtype=torch.int32, device=device)
    inputs = (sample, velocity, next_sample, old_velocity, cu_seqlens, a, b, weight, constant, bias_weight)
    outputs = (sums, counters, logprob_B, None if old_velocity is None else bias_B)
    launch(
        sde_logprob_kernel,
        (num_tiles,),
        *_make_contiguous(inputs),
        *outputs,
        num_samples,
        num_tiles,
        **constants,
        REDUCE_SUM=reduce_sum,
    )
    return logprob_B, bias_B


@torch.library.custom_op(
    "realign_kernels::sde_logprob_backward_triton",
    mutates_args=(),
    schema=f"({_STEP}, Tensor weight, bool reduce_sum, Tensor? old_velocity, Tensor? bias_weight, "
    "Tensor grad_logprob, Tensor? grad_bias) -> Tensor",
)
def sde_logprob_backward_triton(
    sample: Tensor,
    velocity: Tensor,
    next_sample: Tensor,
    cu_seqlens: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    reduce_sum: bool,
    old_velocity: Tensor | None,
    bias_weight: Tensor | None,
    grad_logprob: Tensor,
    grad_bias: Tensor | None,
) -> Tensor:
    """Gradient to the velocity, in its dtype."""
    grad_LC = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    num_samples = cu_seqlens.numel() - 1
    if grad_LC.numel() == 0:
        return grad_LC
    constants = tile_constants(velocity.shape[1], cu_seqlens)
    grid = (num_programs(velocity.shape[0], num_samples, constants["BT"]),)
    inputs = (sample, velocity, next_sample, old_velocity, cu_seqlens, a, b, weight, bias_weight)
    grads = (grad_logprob, None if old_velocity is None else grad_bias)
    launch(
        sde_logprob_backward_kernel,
        grid,
        *_make_contiguous((*inputs, *grads)),
        grad_LC,
        num_samples,
        num_warps=8,  # with 4 the compiler spills at some odd widths
        **constants,
        REDUCE_SUM=reduce_sum,
    )
    return grad_LC


def _make_contiguous(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@sde_logprob_triton.register_fake
def _(
    sample, velocity, next_sample, cu_seqlens, a, b, weight, constant, reduce_sum, old_velocity, bias_weight
):
    logprob_B = torch.empty(a.shape, device=velocity.device)
    return logprob_B, torch.empty(0 if old_velocity is None else a.shape[0], device=velocity.device)


@sde_logprob_backward_triton.register_fake
def _(sample, velocity, *rest):
    return torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
