"""group_advantage: rewards of G prompts with M pictures each, to advantages."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.case import PLAIN, Case, Op, Run, Shape, allow_error, count_bytes, list_impls, randn
from realign_kernels import group_advantage

EPSILON = 1e-4
SHAPES = [Shape({"G": groups, "M": members}) for groups, members in ((48, 24), (16, 16), (48, 32), (512, 32))]


def build(shape: Shape, device: torch.device) -> Case:
    """Groups lie one after the other: the baseline that views them as a table can do no other order."""
    num_groups, num_members = shape.sizes["G"], shape.sizes["M"]
    rewards_N = randn(shape, device, "G", "M").flatten()
    group_N = torch.arange(num_groups, device=device).repeat_interleave(num_members)

    def plain() -> tuple[Tensor, ...]:
        """TRL's, with the population's deviation: of a view, repeated for every member."""
        mean_G = rewards_N.view(-1, num_members).mean(dim=1)
        std_G = rewards_N.view(-1, num_members).std(dim=1, correction=0)
        is_degenerate_G = torch.isclose(std_G, torch.zeros_like(std_G))
        mean_N = mean_G.repeat_interleave(num_members, dim=0)
        std_N = std_G.repeat_interleave(num_members, dim=0)
        return (rewards_N - mean_N) / (std_N + EPSILON), mean_G, std_G, is_degenerate_G

    def flow_grpo() -> Tensor:
        """Flow-GRPO's: NumPy on the host, prompt after prompt."""
        rewards, group = rewards_N.numpy().astype(np.float64), group_N.numpy()
        advantage = np.zeros_like(rewards)
        for prompt in np.unique(group):
            own = rewards[group == prompt]
            advantage[group == prompt] = (own - own.mean()) / (own.std() + EPSILON)
        return torch.from_numpy(advantage)

    def run(impl: str) -> Run:
        return lambda: tuple(vars(group_advantage(rewards_N, group_N, num_groups, impl=impl)).values())

    runs = {PLAIN: plain} | {impl: run(impl) for impl in list_impls(["cpp", "triton"], device)}
    if device.type == "cpu":
        runs["flow_grpo"] = flow_grpo
    return Case(runs, count_bytes(rewards_N, group_N, *plain()), allow_error(shape))


OPS = {"group_advantage": Op(build, SHAPES, SHAPES)}
