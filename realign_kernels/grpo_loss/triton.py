"""Triton path of `grpo_loss`. Forward makes the gradients too; backward multiplies them by the incoming one.

One launch over the entries; before it, where there is a KL, one over tiles of the velocities, which sums
squares and writes the gradient. Backward scales that gradient in place, and touches nothing where it is to be
multiplied by 1.
N entries, L packed tokens, C channels, P tiles.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from realign_kernels.grpo_loss.kernels import grpo_loss_kernel, scale_kernel, velocity_kl_kernel
from realign_kernels.grpo_loss.reference import GrpoMetrics, RatioGuard, VelocityKL
from realign_kernels.launch import launch
from realign_kernels.tiles import num_programs, tile_constants

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
