"""group_advantage: rewards of G prompts with M pictures each, to advantages; R rewards a picture."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.case import PLAIN, Case, Op, Run, Shape, allow_error, count_bytes, list_impls, randn
from realign_kernels import AdvantageRule, group_advantage

SIZES = ((48, 24), (16, 16), (48, 32), (512, 32))
SHAPES = [Shape({"G": groups, "M": members}) for groups, members in SIZES]
SEVERAL = [Shape({"G": groups, "M": members, "R": 3}) for groups, members in SIZES]


def plain_advantage(rewards_NR: Tensor, num_members: int, weights_R: Tensor, rule: AdvantageRule) -> tuple:
    """TRL's, with the population's deviation: of a view, repeated for every member; reward after reward."""
    table_GMR = rewards_NR.view(-1, num_members, rewards_NR.shape[1])
    mean_GR, std_GR = table_GMR.mean(dim=1), table_GMR.std(dim=1, correction=0)
    is_degenerate_G = torch.isclose(std_GR, torch.zeros_like(std_GR)).all(dim=1)
    mean_NR = mean_GR.repeat_interleave(num_members, dim=0)
    if rule.std == "global":
        std_NR = rewards_NR.std(dim=0, correction=0)
    else:
        std_NR = std_GR.repeat_interleave(num_members, dim=0)
    advantage_N = ((rewards_NR - mean_NR) / (std_NR + rule.epsilon) * weights_R).sum(dim=1)
    return advantage_N, mean_GR.squeeze(1), std_GR.squeeze(1), is_degenerate_G


def flow_grpo_advantage(rewards_N: Tensor, group_N: Tensor, rule: AdvantageRule) -> Tensor:
    """Flow-GRPO's: NumPy on the host, prompt after prompt."""
    rewards, group = rewards_N.numpy().astype(np.float64), group_N.numpy()
    advantage = np.zeros_like(rewards)
    for prompt in np.unique(group):
        own = rewards[group == prompt]
        std = rewards.std() if rule.std == "global" else own.std()
        advantage[group == prompt] = (own - own.mean()) / (std + rule.epsilon)
    return torch.from_numpy(advantage)


def build(rule: AdvantageRule, shape: Shape, device: torch.device) -> Case:
    """Groups lie one after the other: the baseline, which views them as a table, can do no other order."""
    num_groups, num_members = shape.sizes["G"], shape.sizes["M"]
    num_rewards = shape.sizes.get("R", 1)
    sized = Shape({"N": num_groups * num_members, "R": num_rewards})
    rewards_NR, weights_R = randn(sized, device, "N", "R"), torch.ones(num_rewards, device=device)
    rewards_N = rewards_NR if num_rewards > 1 else rewards_NR[:, 0]
    group_N = torch.arange(num_groups, device=device).repeat_interleave(num_members)

    def plain() -> tuple[Tensor, ...]:
        return plain_advantage(rewards_NR, num_members, weights_R, rule)

    def run(impl: str) -> Run:
        weights = weights_R if num_rewards > 1 else None
        return lambda: tuple(
            vars(group_advantage(rewards_N, group_N, num_groups, weights, rule, impl)).values()
        )

    runs = {PLAIN: plain} | {impl: run(impl) for impl in list_impls(["cpp", "triton"], device)}
    if device.type == "cpu" and num_rewards == 1:
        runs["flow_grpo"] = partial(flow_grpo_advantage, rewards_N, group_N, rule)
    return Case(runs, count_bytes(rewards_N, group_N, *plain()), allow_error(shape))


OPS = {
    "group_advantage": Op(partial(build, AdvantageRule()), SHAPES, SHAPES),
    "group_advantage.global": Op(partial(build, AdvantageRule(std="global")), SHAPES[:1], SHAPES),
    "group_advantage.each": Op(partial(build, AdvantageRule(normalize="each")), SEVERAL[:1], SEVERAL),
}
