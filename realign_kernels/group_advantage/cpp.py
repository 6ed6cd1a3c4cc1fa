"""`group_advantage` through the compiled extension, as a torch custom op. N samples, R rewards, G groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.group_advantage.outputs import SCHEMA, STD_CODES, allocate_outputs


@torch.library.custom_op(
    "realign_kernels::group_advantage", mutates_args=(), device_types="cpu", schema=SCHEMA
)
def group_advantage_cpp(
    rewards_NR: Tensor,
    group_N: Tensor,
    num_groups: int,
    weights_R: Tensor | None,
    std: str,
    normalize: str,
    epsilon: float,
    clamp: float | None,
    correction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`group_advantage` on the CPU, in double: advantages, means, deviations, which are degenerate."""
    outputs = allocate_outputs(rewards_NR, num_groups, normalize)
    params = native._C.GroupAdvantageParams()
    params.num_samples, params.num_rewards = rewards_NR.shape
    params.num_groups = num_groups
    params.std, params.normalizes_each = STD_CODES[std], normalize == "each"
    params.epsilon, params.correction = epsilon, correction
    params.clamp = math.inf if clamp is None else clamp
    arrays = {"rewards": rewards_NR.float(), "weights": weights_R, "group": group_N}
    arrays |= dict(zip(("advantage", "group_mean", "group_std", "is_degenerate"), outputs, strict=True))
    contiguous = {name: array.contiguous() for name, array in arrays.items() if array is not None}
    for name, array in contiguous.items():
        setattr(params, name, array.data_ptr())
    native._C.group_advantage(params)
    return outputs


@group_advantage_cpp.register_fake
def _(rewards_NR, group_N, num_groups, weights_R, std, normalize, epsilon, clamp, correction):
    return allocate_outputs(rewards_NR, num_groups, normalize)
