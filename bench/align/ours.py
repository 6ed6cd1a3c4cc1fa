"""An iteration of `train.rga`, watched from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.align.outcome import Outcome
from bench.generate.baseline import Made
from bench.generate.clock import ENGINE_PLACES, PHASES, Clock, NoClock, always, watch_places
from realign.model.bagel import Bagel
from realign.runtime.request import Request, Sample
from train.ranks import Ranks
from train.recipe import Recipe
from train.rga import Aligner
from train.rollouts import Rollout

# `bench.generate`'s, which are the rollout's; then `reward`, `rebuilding` contexts for replays, `replay`
# forward and backward, `update` by the optimiser, `publishing` the new weights.
ALIGN_PHASES = (*PHASES, "reward", "rebuilding", "replay", "update", "publishing")
ALIGN_PLACES = (
    *ENGINE_PLACES,
    ("train.rga", "score", always("reward")),
    ("train.replay", "Replayer._rebuild", always("rebuilding")),
    ("train.update", "Updater._accumulate", always("replay")),
    ("train.update", "Updater._step", always("update")),
    ("train.policy", "Policy.publish", always("publishing")),
)


def build_clock(device: torch.device) -> Clock:
    """A clock of an iteration."""
    return Clock(device, ALIGN_PHASES, closed=("rebuilding",))


class Ours:
    """Iterations of a recipe.

    Args:
        model: if it is not the recipe's; as it is not loaded again, its iterations go on from each other.
        keeps_gradients: whether outcomes have them.

    Attributes:
        row: the log's, of the last iteration.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, model: Bagel | None = None, keeps_gradients: bool = True
    ) -> None:
        self.recipe, self.device, self.keeps_gradients = recipe, str(device), keeps_gradients
        self.rollouts: list[Rollout] = []
        self.rewards: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}
        self.row: dict[str, Any] = {}
        self.is_lasting = model is not None
        self._start(model)

    def reset(self) -> None:
        """Back to the beginning: the next iteration is the first."""
        if not self.is_lasting:
            self._start(None)

    def iterate(self, clock: Clock | NoClock) -> Outcome:
        """The next iteration."""
        self.rollouts, self.rewards, self.gradients = [], [], {}
        with watch_places(clock, ALIGN_PLACES):
            self.row = self.aligner.iterate()
        samples = [rollout.sample for rollout in self.rollouts]
        logprobs = [[step.logprob for step in s.trajectory.recording.noisy_steps] for s in samples]
        return Outcome(
            [to_made(sample) for sample in samples],
            torch.tensor(logprobs),
            torch.cat(self.rewards),
            self.row["first_ratio_error"],
            self.gradients,
        )

    @property
    def requests(self) -> list[tuple[int, Request]]:
        """Of the last iteration, each with the number of its group."""
        return [(rollout.group, rollout.sample.request) for rollout in self.rollouts]

    def _start(self, model: Bagel | None) -> None:
        self.aligner = aligner = Aligner(self.recipe, Ranks(device=self.device), model)
        _tell(aligner.roller, "roll", lambda rollouts: self.rollouts.extend(rollouts))
        _tell(aligner.reward, "score_parts", lambda parts: self.rewards.append(sum(parts.values())))
        if self.keeps_gradients:
            aligner.updater.optimizer.adamw.register_step_pre_hook(self._keep_gradients)

    def _keep_gradients(self, *_: object) -> None:
        masters = self.aligner.policy.masters
        self.gradients = {name: master.grad.clone() for name, master in masters.items()}


def to_made(sample: Sample) -> Made:
    """As the baseline says it."""
    turn = next(iter(sample.trajectory.text_turns), None)
    return Made(turn, sample.trajectory.latent_LC, sample.image)


def _tell(owner: object, name: str, listener: Callable[[Any], object]) -> None:
    """Let a listener hear what a method of one object returns."""
    method = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        result = method(*arguments)
        listener(result)
        return result

    setattr(owner, name, call)
