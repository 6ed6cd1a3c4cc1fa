"""Definition of `mot_rope` in plain torch. L tokens, H query heads, K key heads, D head dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from realign_kernels.mot_norm.reference import norm_rows

if TYPE_CHECKING:
    from realign_kernels.mot_rope.arguments import KeyCache, QKNorm, RopeTable


def mot_rope_reference(
    query_LHD: Tensor,
    key_LKD: Tensor,
    rope: RopeTable,
    norm: QKNorm | None,
    expert_L: Tensor | None,
    out_index_L: Tensor | None,
    key_cache: KeyCache | None,
) -> tuple[Tensor, Tensor]:
    """Norm and turn in float32 (float64 for float64), round once, put where asked."""
    query_weights, key_weights = (None, None) if norm is None else (norm.query_weights, norm.key_weights)
    eps = 0.0 if norm is None else norm.eps
    turned_LHD = _norm_and_turn(query_LHD, query_weights, eps, rope, expert_L)
    turned_LKD = _norm_and_turn(key_LKD, key_weights, eps, rope, expert_L)
    if key_cache is None:
        return _place(turned_LHD, out_index_L), _place(turned_LKD, out_index_L)
    key_cache.slots_SKD.index_copy_(0, key_cache.slot_L, turned_LKD)
    return _place(turned_LHD, out_index_L), key_cache.slots_SKD


def _norm_and_turn(
    heads_LHD: Tensor, weights: Sequence[Tensor] | None, eps: float, rope: RopeTable, expert_L: Tensor | None
) -> Tensor:
    wide = torch.promote_types(heads_LHD.dtype, torch.float32)
    if weights is None:
        normed_LHD = heads_LHD.to(wide)
    else:
        normed_LHD = norm_rows(heads_LHD, weights, eps, expert_L, wide)
    return turn(normed_LHD, rope.cos_LA.to(wide), rope.sin_LA.to(wide)).to(heads_LHD.dtype)


def turn(heads_LHD: Tensor, cos_LA: Tensor, sin_LA: Tensor) -> Tensor:
    """Rotate the pair (i, i + D/2) of each head by the angle i of its token."""
    first, second = heads_LHD.chunk(2, dim=-1)
    cos_L1A, sin_L1A = cos_LA.unsqueeze(1), sin_LA.unsqueeze(1)
    return torch.cat((first * cos_L1A - second * sin_L1A, second * cos_L1A + first * sin_L1A), dim=-1)


def _place(rows_L: Tensor, index_L: Tensor | None) -> Tensor:
    """Row l to row index_L[l]."""
    return rows_L if index_L is None else torch.empty_like(rows_L).index_copy_(0, index_L, rows_L)
