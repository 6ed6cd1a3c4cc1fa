"""Signature, formula, checks and dispatch of `mot_rope`.

L tokens, H query heads, K key heads, D head dim, S slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from realign_kernels.checks import can_read_values, check_dtype
from realign_kernels.dispatch import choose_impl
from realign_kernels.mot_norm.api import check_expert, check_weights, pair
from realign_kernels.mot_rope.arguments import KeyCache, QKNorm, RopeTable
from realign_kernels.mot_rope.cpp import mot_rope_cached_cpp, mot_rope_cpp
from realign_kernels.mot_rope.reference import mot_rope_reference


def mot_rope(
    query_LHD: Tensor,
    key_LKD: Tensor,
    rope: RopeTable,
    norm: QKNorm | None = None,
    expert_L: Tensor | None = None,
    out_index_L: Tensor | None = None,
    key_cache: KeyCache | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Norm every head of queries and keys, turn it by its token's angles, put it where attention reads it.

    `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`, halves of `x = mot_norm(head)`, in float32 throughout
    (float64 for float64), rounded once.

    Args:
        query_LHD, key_LKD: [L, H, D] and [L, K, D] of one float dtype; D is even.
        rope: each token's angles.
        norm: weights of the norms; None: heads are turned as they are.
        expert_L: int32 [L], 0 or 1: whose norm weights each token takes; None: the first for all.
        out_index_L: int64 [L], each of 0..L-1 once: the row of the results where each token goes; None: its
        own. key_cache: where keys go instead, which has no gradient. impl: `"auto"` (table in
        `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: query [L, H, D] and key [L, K, D], contiguous; with a `key_cache` its slots are the second.
        Differentiable in queries, keys and weights.
    Raises: ValueError naming the argument and its value.
    Source: Su et al., arXiv 2104.09864, halves paired as in Qwen2; norms of heads: BAGEL, arXiv 2505.14683.
    """
    _check_heads(query_LHD, key_LKD, rope)
    weights: tuple[Tensor, ...] = ()
    if norm is not None:
        check_weights("norm.query_weights", norm.query_weights, query_LHD)
        check_weights("norm.key_weights", norm.key_weights, key_LKD)
        if len(norm.query_weights) != len(norm.key_weights):
            raise ValueError(
                f"norm has {len(norm.query_weights)} query_weights and {len(norm.key_weights)} key_weights: "
                "must be one each, or two each"
            )
        check_expert(expert_L, len(norm.query_weights), query_LHD)
        weights = (*norm.query_weights, *norm.key_weights)
    _check_index(out_index_L, query_LHD)
    _check_cache(key_cache, key_LKD, (query_LHD, key_LKD, *weights))
    path = choose_impl("mot_rope", impl, (query_LHD, key_LKD, *weights), {"cpp": True, "triton": True})
    if path == "reference":
        return mot_rope_reference(query_LHD, key_LKD, rope, norm, expert_L, out_index_L, key_cache)
    op, cached_op = _find_ops(path)
    both = (None,) * 4 if norm is None else (*pair(norm.query_weights), *pair(norm.key_weights))
    eps = 0.0 if norm is None else norm.eps
    given = (query_LHD, key_LKD, rope.cos_LA, rope.sin_LA, *both, expert_L, out_index_L, eps)
    if key_cache is None:
        return op(*given)
    return cached_op(*given, key_cache.slots_SKD, key_cache.slot_L), key_cache.slots_SKD


def _find_ops(path: str) -> tuple[Callable, Callable]:
    if path == "cpp":
        return mot_rope_cpp, mot_rope_cached_cpp
    from realign_kernels.mot_rope.triton import mot_rope_cached_triton, mot_rope_triton

    return mot_rope_triton, mot_rope_cached_triton


def _check_heads(query_LHD: Tensor, key_LKD: Tensor, rope: RopeTable) -> None:
    for name, heads in (("query_LHD", query_LHD), ("key_LKD", key_LKD)):
        if heads.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(heads.shape)}: must be tokens by heads by head dim")
        check_dtype(name, heads.dtype)
    length, _, head_dim = query_LHD.shape
    if head_dim % 2 or not head_dim:
        raise ValueError(f"query_LHD has head dim {head_dim}: must be even")
    wanted = (query_LHD.dtype, query_LHD.device)
    if (length, head_dim) != (len(key_LKD), key_LKD.shape[2]) or wanted != (key_LKD.dtype, key_LKD.device):
        raise ValueError(
            f"key_LKD is {key_LKD.dtype} {tuple(key_LKD.shape)} on {key_LKD.device}: must be "
            f"{query_LHD.dtype} [{length}, K, {head_dim}] on {query_LHD.device}, to go with query_LHD"
        )
    for name, table in (("rope.cos_LA", rope.cos_LA), ("rope.sin_LA", rope.sin_LA)):
        if table.shape != (length, head_dim // 2) or table.device != query_LHD.device:
            raise ValueError(
                f"{name} is {tuple(table.shape)} on {table.device}: "
                f"must be {(length, head_dim // 2)} on {query_LHD.device}, half a head for each token"
            )


def _check_index(out_index_L: Tensor | None, rows: Tensor) -> None:
    if out_index_L is None:
        return
    _check_indexes("out_index_L", out_index_L, rows)
    if can_read_values(out_index_L) and not torch.equal(out_index_L.sort().values, torch.arange(len(rows))):
        raise ValueError(f"out_index_L does not name each of 0 to {len(rows) - 1} once")


def _check_indexes(name: str, index_L: Tensor, rows: Tensor) -> None:
    if index_L.dtype != torch.int64 or index_L.shape != rows.shape[:1] or index_L.device != rows.device:
        raise ValueError(
            f"{name} is {index_L.dtype} {tuple(index_L.shape)} on {index_L.device}: "
            f"must be int64 [{len(rows)}] on {rows.device}, a row per token"
        )


def _check_cache(cache: KeyCache | None, key_LKD: Tensor, inputs: tuple[Tensor, ...]) -> None:
    if cache is None:
        return
    slots = cache.slots_SKD
    if slots.dim() != 3 or slots.shape[1:] != key_LKD.shape[1:] or slots.stride(2) != 1:
        raise ValueError(
            f"key_cache.slots_SKD has shape {tuple(slots.shape)}, strides {slots.stride()}: must be "
            f"[S, {', '.join(map(str, key_LKD.shape[1:]))}], the numbers of a head next to each other"
        )
    if (slots.dtype, slots.device) != (key_LKD.dtype, key_LKD.device):
        raise ValueError(
            f"key_cache.slots_SKD is {slots.dtype} on {slots.device}: "
            f"must be {key_LKD.dtype} on {key_LKD.device}, as key_LKD"
        )
    _check_indexes("key_cache.slot_L", cache.slot_L, key_LKD)
    if can_read_values(cache.slot_L) and cache.slot_L.numel():
        least, most = (int(number) for number in cache.slot_L.aminmax())
        if least < 0 or most >= len(slots):
            wrong = least if least < 0 else most
            raise ValueError(f"key_cache.slot_L holds {wrong}: must be from 0 to {len(slots) - 1}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise ValueError(
            "key_cache is given and a tensor requires a gradient: a cache has none; use torch.no_grad()"
        )
