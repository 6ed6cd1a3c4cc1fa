"""Checks the schedule's noisy steps and the ops of alignment against recorded outputs of their authors' code.

A golden folder may hold `rl.json` (settings) and `rl.safetensors`: steps of Flow-GRPO and DanceGRPO, and
Flow-GRPO's advantages. `flow_grpo.a0.7.step5.` begins the tensors of one step: noise level 0.7, step 5 of the
schedule.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from realign.evals.golden import CaseResult, read_cases, read_tensors, relative_error
from realign.runtime.schedule import Schedule, Step, stack_logprobs, stack_steps
from realign_kernels import AdvantageRule, flow_step, group_advantage, sde_logprob

TOLERANCE = 1e-4
RULES = {"flow_grpo.a": "flow-grpo", "dance_grpo.eta": "dance-grpo"}
STEP_NAME = re.compile(rf"({'|'.join(map(re.escape, RULES))})([0-9.]+)\.step(\d+)\.sample")
ADVANTAGES = {"advantage.global_std_False": "group", "advantage.global_std_True": "global"}


class RLGolden:
    """The alignment part of a golden folder. B samples of L tokens of C channels; always float32."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self.file = read_cases(folder / "rl.json")
        self.tensors = read_tensors(folder / "rl.safetensors")

    def check(self) -> list[CaseResult]:
        """Every recorded step and advantage."""
        results = [self._compare("sigmas", torch.tensor(self.schedule.times))]
        for name in self.tensors:
            match = STEP_NAME.fullmatch(name)
            if match:
                rule, level, index = match.groups()
                step = self.schedule.with_noise(RULES[rule], float(level)).steps[int(index)]
                results.append(self._check_step(name.removesuffix(".sample"), step))
        for name, std in ADVANTAGES.items():
            if name in self.tensors:
                results.append(self._compare(name, self._advantage(std)))
        return results

    @cached_property
    def schedule(self) -> Schedule:
        """The ODE's schedule; each case puts its own noise in."""
        return Schedule.build(self.file["num_sigmas"], self.file["shift"])

    def _check_step(self, name: str, step: Step) -> CaseResult:
        """The worst error of the step's outputs: next sample, log-probs, and what else was recorded."""
        shape = self._tensor(f"{name}.sample").shape
        offsets = torch.arange(shape[0] + 1, dtype=torch.int32, device=self.device) * shape[1]
        fields = {field: self._field(f"{name}.{field}") for field in ("sample", "velocity", "noise")}
        steps = [step] * shape[0]
        coefficients, logprob = stack_steps(steps, self.device), stack_logprobs(steps, self.device)
        next_LC, logprob_B = flow_step(
            fields["sample"], fields["velocity"], offsets, coefficients, fields["noise"], logprob
        )
        ours = {"next": next_LC.view(shape), "log_prob": logprob_B}
        if f"{name}.log_prob_new" in self.tensors:
            stored = (fields["sample"], self._field(f"{name}.next"))
            velocity_LC = self._field(f"{name}.velocity_new")
            ours["log_prob_new"] = sde_logprob(stored, velocity_LC, offsets, coefficients, logprob)
        noiseless = {
            "mean": replace(step, std=0.0),
            "pred_original": replace(step, a=1.0, b=-step.t, std=0.0),
        }
        for field, other in noiseless.items():
            if f"{name}.{field}" in self.tensors:
                numbers = stack_steps([other] * shape[0], self.device)
                ours[field] = flow_step(fields["sample"], fields["velocity"], offsets, numbers).view(shape)
        if f"{name}.std_dev_t" in self.tensors:
            ours["std_dev_t"] = torch.full((shape[0],), step.std / math.sqrt(-step.dt))
        # A log-prob is its constant less the error, which may come out near zero.
        least = {"log_prob": abs(step.logprob_constant), "log_prob_new": abs(step.logprob_constant)}
        errors = [
            relative_error(tensor, self._tensor(f"{name}.{field}"), least.get(field, 0.0))
            for field, tensor in ours.items()
        ]
        return CaseResult(name, max(errors), TOLERANCE)

    def _advantage(self, std: str) -> Tensor:
        """Flow-GRPO's groups are the prompts."""
        prompts = self.file["prompts"]
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        group_N = torch.tensor([numbers[prompt] for prompt in prompts], device=self.device)
        rewards_N = self._tensor("advantage.rewards").float().to(self.device)
        return group_advantage(rewards_N, group_N, len(numbers), rule=AdvantageRule(std=std)).advantage_N

    def _field(self, name: str) -> Tensor:
        return self._tensor(name).flatten(0, 1).to(self.device)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"rl.safetensors: the tensor {name!r} is missing")
        return self.tensors[name]

    def _compare(self, name: str, ours: Tensor) -> CaseResult:
        return CaseResult(name, relative_error(ours, self._tensor(name)), TOLERANCE)
