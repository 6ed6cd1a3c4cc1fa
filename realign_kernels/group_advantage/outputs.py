"""What the compiled paths of `group_advantage` share: their schema and the shapes of their results."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMA = (
    "(Tensor rewards, Tensor group, SymInt num_groups, Tensor? weights, "
    "str std, str normalize, float epsilon, float? clamp, int correction) -> (Tensor, Tensor, Tensor, Tensor)"
)
STD_CODES = {"none": 0, "group": 1, "global": 2}


def allocate_outputs(
    rewards_NR: Tensor, num_groups: int, normalize: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advantages [N], means and standard deviations [G, K], and whether each group is degenerate [G]."""
    device = rewards_NR.device
    num_samples, num_rewards = rewards_NR.shape
    num_columns = num_rewards if normalize == "each" else 1
    return (
        torch.empty(num_samples, dtype=torch.float32, device=device),
        torch.empty(num_groups, num_columns, dtype=torch.float32, device=device),
        torch.empty(num_groups, num_columns, dtype=torch.float32, device=device),
        torch.empty(num_groups, dtype=torch.bool, device=device),
    )
