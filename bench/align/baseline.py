"""An iteration as the reference trainers of BAGEL do it: batch of one, on `bench.generate`'s baseline.

Rollouts one after the other, each writing its chain and drawing its picture by itself; rewards picture by
picture, through PIL on the host; replay sample by sample and step by step, the contexts rebuilt for each
without a gradient, a backward pass for each; then one step of the optimiser (Flow-GRPO `train_bagel.py`,
Flow-Factory's BAGEL adapter). Kinder than they are: of the three contexts only those that guidance uses are
read; nothing is sharded, offloaded or computed again.

L latent tokens, C channels, N samples, S stochastic steps of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.align.noise import Recorder, logprob_again
from bench.align.outcome import Outcome
from bench.align.scoring import OneByOne
from bench.generate.baseline import Baseline, Flow, Made, list_steps
from bench.generate.clock import Clock, NoClock
from bench.generate.forward import cut_projections
from realign.model.bagel import Bagel
from realign.model.linear import FusedLinear
from realign.runtime.request import Request
from realign_kernels import group_advantage
from train.policy import is_generation
from train.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Rolled:
    """A sample: its request, its group, what it made, its recorded steps."""

    request: Request
    group: int
    made: Made
    recorder: Recorder


class ReferenceTrainer:
    """Trains the generation expert of a model in place, in the model's own precision.

    Args:
        score: the reward.
    """

    def __init__(self, model: Bagel, recipe: Recipe, score: OneByOne) -> None:
        if recipe.policy.kind != "full" or recipe.update.updates * recipe.update.epochs != 1:
            raise ValueError("the baseline trains whole weights, with one update an iteration")
        self.model, self.recipe, self.score = model.requires_grad_(False), recipe, score
        self.weights = list_weights(model)
        for parts in self.weights.values():
            for part in parts:
                part.requires_grad_(True)
        update = recipe.update
        self.optimizer = torch.optim.AdamW(
            [part for parts in self.weights.values() for part in parts],
            lr=update.rate(0),
            betas=tuple(update.betas),
            weight_decay=update.weight_decay,
        )

    def iterate(self, requests: Sequence[tuple[int, Request]], clock: Clock | NoClock) -> Outcome:
        """One iteration of requests with their groups' numbers."""
        with clock.phase("other"):
            baseline = Baseline(self.model, clock=clock)
            rolled = []
            for group, request in requests:
                recorder = Recorder(request)
                rolled.append(Rolled(request, group, baseline.run(request, recorder), recorder))
            with clock.phase("reward"):
                reward_N = torch.tensor([self.score(one.request, one.made) for one in rolled])
            advantages = self._judge(reward_N, [one.group for one in rolled])
            ratio_error = self._replay_all(baseline, rolled, advantages, clock)
            with clock.phase("update"):
                gradients = self._step()
            logprob_NS = torch.tensor([[logprob for *_, logprob in one.recorder.kept] for one in rolled])
            return Outcome([one.made for one in rolled], logprob_NS, reward_N, ratio_error, gradients)

    def _judge(self, reward_N: Tensor, groups: Sequence[int]) -> list[float]:
        found = group_advantage(
            reward_N, torch.tensor(groups), self.recipe.rollout.prompts, rule=self.recipe.advantage
        )
        return found.advantage_N.tolist()

    def _replay_all(
        self,
        baseline: Baseline,
        rolled: Sequence[Rolled],
        advantages: Sequence[float],
        clock: Clock | NoClock,
    ) -> float:
        """Adds up the gradients of all steps of all samples; how far the ratios were off one."""
        count = sum(len(one.recorder.kept) for one in rolled)
        errors = [0.0]
        for one, advantage in zip(rolled, advantages, strict=True):
            for number, *step, old in one.recorder.kept:
                with clock.phase("rebuilding"):
                    flow = self._rebuild(baseline, one)
                with clock.phase("replay"):
                    logprob = self._take_again(flow, one.request, number, *step)
                    ratio = (logprob - old).exp()
                    (self._lose(ratio, advantage) / count).backward()
                    errors.append(abs(float(ratio.detach()) - 1))
        return max(errors)

    @torch.no_grad()
    def _rebuild(self, baseline: Baseline, one: Rolled) -> Flow:
        branches, size = baseline.read_prompt(one.request)
        if one.made.turn is not None:
            baseline.reader.read_text(branches.conditional, one.made.turn.text)
        return Flow(baseline.reader, branches, size, one.request.settings.guidance)

    def _take_again(
        self, flow: Flow, request: Request, number: int, sample_LC: Tensor, next_LC: Tensor
    ) -> Tensor:
        time, _, is_guided = list_steps(request.settings)[number]
        velocity_LC = flow.velocity(sample_LC, time, is_guided)
        return logprob_again(request, number, sample_LC, next_LC, velocity_LC)

    def _lose(self, ratio: Tensor, advantage: float) -> Tensor:
        clipped = ratio.clamp(1 - self.recipe.update.clip_low, 1 + self.recipe.update.clip_high)
        return torch.maximum(-advantage * ratio, -advantage * clipped)

    def _step(self) -> dict[str, Tensor]:
        """Changes the weights; their gradients, as they were after clipping."""
        parts = [part for parts in self.weights.values() for part in parts]
        torch.nn.utils.clip_grad_norm_(parts, self.recipe.update.grad_clip)
        gradients = {name: torch.cat([part.grad for part in own]) for name, own in self.weights.items()}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return gradients


def list_weights(model: Bagel) -> dict[str, list[nn.Parameter]]:
    """The generation expert's weights by name, those of a fused layer in parts, as the baseline uses them."""
    fused = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedLinear):
            cut = cut_projections(module).values()
            fused[f"{name}.weight"] = [part.weight for part in cut]
            fused[f"{name}.bias"] = [part.bias for part in cut]
    named = dict(model.named_parameters())
    return {name: fused.get(name, [weight]) for name, weight in named.items() if is_generation(name)}
