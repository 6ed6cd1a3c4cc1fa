"""Signature, formula, checks and dispatch of `mot_norm`. L packed tokens, E width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realign_kernels.checks import can_read_values, check_packed
from realign_kernels.dispatch import choose_impl
from realign_kernels.mot_norm.cpp import mot_norm_cpp
from realign_kernels.mot_norm.reference import mot_norm_reference


def mot_norm(
    hidden_LE: Tensor,
    weights: Sequence[Tensor],
    eps: float = 1e-6,
    expert_L: Tensor | None = None,
    residual_LE: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm of each token by its expert's weight: `weight[expert] * x / sqrt(mean(x^2) + eps)`.

    With a residual, `x = hidden + residual`, rounded to its dtype as a sum on its own would be; it is
    returned too. The quotient is rounded to the dtype of `x`, and so is the weight, before they are
    multiplied: Qwen2 does so. All else is float32 (float64 for float64).

    Args:
        hidden_LE: [L, E], any float dtype.
        weights: one or two tensors [E], float: of understanding, of generation.
        eps: added to the mean square.
        expert_L: int32 [L], 0 or 1: whose weight each token takes, in any order; None: the first for all.
        residual_LE: [L, E], any float dtype: added first. The sum has the dtype that torch gives it.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: normed [L, E]; with a residual (normed [L, E], sum [L, E]). Differentiable in hidden states,
        residual and weights.
    Raises: ValueError naming the argument and its value.
    Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4; experts: BAGEL, arXiv 2505.14683.
    """
    check_packed("hidden_LE", hidden_LE)
    check_weights("weights", weights, hidden_LE)
    check_expert(expert_L, len(weights), hidden_LE)
    if residual_LE is not None:
        check_packed("residual_LE", residual_LE)
        if residual_LE.shape != hidden_LE.shape or residual_LE.device != hidden_LE.device:
            raise ValueError(
                f"residual_LE is {tuple(residual_LE.shape)} on {residual_LE.device}: "
                f"must be {tuple(hidden_LE.shape)} on {hidden_LE.device}, as hidden_LE"
            )
    path = choose_impl("mot_norm", impl, (hidden_LE, residual_LE, *weights), {"cpp": True, "triton": True})
    if path == "reference":
        return mot_norm_reference(hidden_LE, weights, eps, expert_L, residual_LE)
    if path == "cpp":
        op = mot_norm_cpp
    else:
        from realign_kernels.mot_norm.triton import mot_norm_triton as op
    normed_LE, total_LE, _ = op(hidden_LE, residual_LE, *pair(weights), expert_L, eps)
    return normed_LE if residual_LE is None else (normed_LE, total_LE)


def pair(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Both experts' weights; None where there is one."""
    return weights[0], weights[1] if len(weights) > 1 else None


def check_weights(name: str, weights: Sequence[Tensor], rows: Tensor) -> None:
    """Raise ValueError unless `weights` are one or two float tensors for the last dimension of `rows`."""
    if not 1 <= len(weights) <= 2:
        raise ValueError(f"{name} has {len(weights)} tensors: must be understanding's, or also generation's")
    for index, weight in enumerate(weights):
        if weight.shape != rows.shape[-1:] or not weight.is_floating_point() or weight.device != rows.device:
            raise ValueError(
                f"{name}[{index}] is {weight.dtype} {tuple(weight.shape)} on {weight.device}: "
                f"must be float [{rows.shape[-1]}] on {rows.device}, a number per channel"
            )


def check_expert(expert_L: Tensor | None, num_experts: int, rows: Tensor) -> None:
    """Raise ValueError unless `expert_L` is int32 [L], each number one of `num_experts`."""
    if expert_L is None:
        return
    if expert_L.dtype != torch.int32 or expert_L.shape != rows.shape[:1] or expert_L.device != rows.device:
        raise ValueError(
            f"expert_L is {expert_L.dtype} {tuple(expert_L.shape)} on {expert_L.device}: "
            f"must be int32 [{len(rows)}] on {rows.device}, a number per token"
        )
    if can_read_values(expert_L) and expert_L.numel():
        least, most = (int(number) for number in expert_L.aminmax())
        if least < 0 or most >= num_experts:
            wrong = least if least < 0 else most
            raise ValueError(f"expert_L holds {wrong}: must be from 0 to {num_experts - 1}")
