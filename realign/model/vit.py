"""The SigLIP vision tower over packed patches: pictures of any size in one sequence, each apart.

Shapes: `L` packed patches, `P` numbers in a patch, `E` width, `H` heads, `D` head dim, `N` patches of a
picture, `B` consecutive pictures of one size.
"""

from __future__ import annotations

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import nn

from realign.model.config import ViTConfig
from realign.model.embeddings import find_activation
from realign.model.linear import FusedLinear


class VisionTransformer(nn.Module):
    """SigLIP (arXiv 2303.15343) as in BAGEL: linear patch embedding, learned positions, no pooling head."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(config.patch_dim, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, patches_LP: torch.Tensor, position_L: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """Packed patches to features [L, E], after the last norm.

        Args:
            patches_LP: float, all pictures' patches; pixels in [-1, 1], channels last within a patch.
            position_L: int64, rows of the position table.
            cu_seqlens: int32 [num_pictures + 1], where each picture begins; the last is L.
        """
        runs = _find_runs(cu_seqlens, len(patches_LP))
        patches_LP = patches_LP.to(self.patch_embedding.weight.dtype)
        hidden_LE = self.patch_embedding(patches_LP) + self.position_embedding(position_L)
        for layer in self.layers if runs else ():
            hidden_LE = layer(hidden_LE, runs)
        return self.post_norm(hidden_LE)


class ViTLayer(nn.Module):
    """Pre-norm block: attention within each picture, then an MLP."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.activation = find_activation(config.hidden_act)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv_proj = FusedLinear(width, dict.fromkeys(("q_proj", "k_proj", "v_proj"), width))
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, hidden_LE: torch.Tensor, runs: list[tuple[int, int]]) -> torch.Tensor:
        hidden_LE = hidden_LE + self.out_proj(self._attend(self.norm1(hidden_LE), runs))
        return hidden_LE + self.fc2(self.activation(self.fc1(self.norm2(hidden_LE))))

    def _attend(self, normed_LE: torch.Tensor, runs: list[tuple[int, int]]) -> torch.Tensor:
        sizes = [count * length for count, length in runs]
        parts = zip(runs, self.qkv_proj(normed_LE).split(sizes), strict=True)
        return torch.cat([self._attend_run(length, part) for (_, length), part in parts])

    def _attend_run(self, length: int, qkv: torch.Tensor) -> torch.Tensor:
        """Full attention within each of the consecutive pictures of `length` patches."""
        heads = qkv.view(-1, length, 3, qkv.shape[-1] // (3 * self.head_dim), self.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()
        return attend_fully(query, key, value).transpose(1, 2).reshape(len(qkv), -1)


def attend_fully(query_BHND: torch.Tensor, key_BHND: torch.Tensor, value_BHND: torch.Tensor) -> torch.Tensor:
    """`softmax(Q K^T / sqrt(D)) V` without a mask.

    bf16 on a CPU is computed in float32: torch's fused bf16 backward is 1.5 to 12 times slower there.
    """
    if query_BHND.device.type == "cpu" and query_BHND.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            wide = F.scaled_dot_product_attention(query_BHND.float(), key_BHND.float(), value_BHND.float())
        return wide.to(query_BHND.dtype)
    return F.scaled_dot_product_attention(query_BHND, key_BHND, value_BHND)


def _find_runs(cu_seqlens: torch.Tensor, num_patches: int) -> list[tuple[int, int]]:
    """Consecutive pictures of one size as (count, patches each): what can be attended to as one batch."""
    bounds = cu_seqlens.tolist()
    if bounds[:1] != [0] or bounds[-1] != num_patches:
        raise ValueError(f"cu_seqlens must run from 0 to the number of patches, {num_patches}; got {bounds}")
    return [
        (len(list(group)), length) for length, group in groupby(b - a for a, b in pairwise(bounds)) if length
    ]
