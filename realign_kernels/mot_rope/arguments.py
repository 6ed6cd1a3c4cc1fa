"""What `mot_rope` takes beside queries and keys. L tokens, K key heads, D head dim, S slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RopeTable:
    """Cosine and sine of each token's D/2 angles, [L, D/2], float32 whatever the heads' dtype."""

    cos_LA: Tensor
    sin_LA: Tensor

    @classmethod
    def build(cls, position_L: Tensor, head_dim: int, theta: float) -> RopeTable:
        """Angles `position * theta^(-2 i / D)` (arXiv 2104.09864), in float32."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_L.device) / head_dim
        angle_LA = position_L.float()[:, None] * (1.0 / theta**exponent)
        return cls(angle_LA.cos(), angle_LA.sin())


@dataclass(frozen=True, eq=False)
class QKNorm:
    """The RMS norm of every head before it is turned.

    Attributes:
        query_weights, key_weights: one or two tensors [D] each: of understanding, of generation.
        eps: added to the mean square.
    """

    query_weights: Sequence[Tensor]
    key_weights: Sequence[Tensor]
    eps: float = 1e-6


@dataclass(frozen=True, eq=False)
class KeyCache:
    """Where keys go instead of a tensor of their own.

    Attributes:
        slots_SKD: written in place; rows and heads may have any strides, the numbers of a head lie together.
        slot_L: int64 [L], the slot of each token; no two the same.
    """

    slots_SKD: Tensor
    slot_L: Tensor
