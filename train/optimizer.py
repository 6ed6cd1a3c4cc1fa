"""What changes the masters: AdamW with a moving average, whole on every process.

`train.zero` has the other way, which shards. Both hold a master's moments and average under the same names
and give them up whole, so that a checkpoint of one can be gone on with by the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.policy import Policy
from train.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
Pieces = Iterator[dict[str, Tensor]]


class AveragedAdamW(torch.optim.AdamW):
    """AdamW that keeps a moving average of its parameters: `average = decay * average + (1 - decay) * p`.

    Attributes:
        has_average: whether there is one; without, it is the parameters.
        decay: of the average, at the next step.
        is_moved: whether there is anything to take the next steps by.
    """

    def __init__(self, parameters: Sequence[Any], has_average: bool, **options: Any) -> None:
        super().__init__(parameters, fused=True, **options)
        self.has_average, self.decay = has_average, 0.0
        self.is_moved = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step, if `is_moved`; else moments are made, and no more."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.prepare(parameters)
        if self.is_moved:
            super().step()
            if self.has_average:
                averages = [self.state[p]["average"] for p in parameters]
                torch._foreach_lerp_(averages, parameters, 1 - self.decay)

    def set_rates(self, rate: float, decay: float) -> None:
        """Of the next step: groups that have a `share` learn at that share of the rate."""
        self.decay = decay
        for group in self.param_groups:
            group["lr"] = rate * group.get("share", 1.0)

    @torch.no_grad()
    def prepare(self, parameters: Sequence[Tensor]) -> None:
        """Makes the moments of parameters that have none, and begins their average."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p] |= {name: torch.zeros_like(p) for name in MOMENTS}
                self.state[p] |= {"average": p.detach().clone()} if self.has_average else {}


class Optimizer(ABC):
    """Takes gradients from a policy's leaves and changes its masters. All methods but `collect` of one
    process alone are called by all processes together.
    """

    policy: Policy

    @abstractmethod
    def collect(self) -> None:
        """Takes over the gradients that one backward left; processes may do so different numbers of times."""

    @abstractmethod
    def step(self, rate: float, decay: float) -> float:
        """One step, gradients added up over processes and clipped.

        Args:
            rate: of learning.
            decay: of the average.

        Returns: the norm of the gradient before it was clipped. Where that is 0 or not finite nothing is
            changed, by momentum and weight decay neither.
        """

    @abstractmethod
    def averages(self) -> Pieces:
        """The moving average, whole, some tensors at a time; the masters where there is none."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything as a checkpoint keeps it: `master.NAME`, `average.NAME`, `optimizer.MOMENT.NAME`. Of
        processes that share the masters among them, only the first has it.
        """

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`, on every process."""


class WholeOptimizer(Optimizer):
    """Masters and moments whole on every process; the policy's hooks add the gradients to the masters."""

    def __init__(
        self, policy: Policy, build: Callable[[Sequence[Tensor]], AveragedAdamW], clip: float, ranks: Ranks
    ) -> None:
        self.policy, self.clip, self.ranks = policy, clip, ranks
        self.adamw = build(list(policy.masters.values()))

    def collect(self) -> None:
        """The policy's hooks have done it."""

    def step(self, rate: float, decay: float) -> float:
        parameters = list(self.policy.masters.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.ranks.sum(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip)
        if bool(norm.isfinite() & (norm > 0)):
            self.adamw.set_rates(rate, decay)
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return float(norm)

    def averages(self) -> Pieces:
        if not self.adamw.has_average:
            yield dict(self.policy.masters)
            return
        self.adamw.prepare(list(self.policy.masters.values()))
        yield {name: self.adamw.state[p]["average"] for name, p in self.policy.masters.items()}

    def tensors(self) -> dict[str, Tensor]:
        return dict(self._list_state())

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, own in self._list_state():
            own.copy_(tensors[name])

    def _list_state(self) -> Iterator[tuple[str, Tensor]]:
        """All there is, by its name in a checkpoint."""
        self.adamw.prepare(list(self.policy.masters.values()))
        for name, master in self.policy.masters.items():
            for key, own in {"master": master, **self.adamw.state[master]}.items():
                yield name_state(name, key), own


def name_state(name: str, key: str) -> str:
    """How a checkpoint calls a master (`key` "master"), or what belongs to it."""
    return f"{key}.{name}" if key in ("master", "average") else f"optimizer.{key}.{name}"


def split_pieces(masters: Mapping[str, nn.Parameter], elements: int) -> list[dict[str, nn.Parameter]]:
    """Masters in their order, so many numbers together at most, or one tensor."""
    pieces: list[dict[str, nn.Parameter]] = [{}]
    total = 0
    for name, master in masters.items():
        size = count_elements(master)
        if pieces[-1] and total + size > elements:
            pieces.append({})
            total = 0
        pieces[-1][name] = master
        total += size
    return pieces


def count_elements(master: nn.Parameter) -> int:
    """Of the whole tensor; one that DeepSpeed shards is itself empty."""
    return getattr(master, "ds_numel", master.numel())
