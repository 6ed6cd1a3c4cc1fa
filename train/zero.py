"""Masters, moments, average and gradients shared among processes by DeepSpeed's ZeRO (arXiv 1910.02054).

The engine's own weights are not sharded: every process rolls out and replays with all of them, in the
engine's dtype. What is shared is float32 and the trainer's: DeepSpeed owns the masters as the parameters of a
module whose only gradient is what a replay left with the policy's leaves. So

- stage 1 shares moments and average; masters and their gradients are whole on every process;
- stage 2 also shares gradients, as soon as a forward's are there;
- stage 3 also shares the masters, which are gathered some at a time when they are published.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.optimizer import (
    MOMENTS,
    AveragedAdamW,
    Optimizer,
    Pieces,
    WholeOptimizer,
    name_state,
    split_pieces,
)
from train.policy import Policy
from train.ranks import Ranks

STAGES = (0, 1, 2, 3)
PIECE = 2**28  # numbers gathered at a time: a gigabyte


@dataclass(frozen=True)
class ScaleOptions:
    """How the processes of a run share its float32 tensors.

    Attributes:
        zero: DeepSpeed's ZeRO stage; 0: each process has everything, and DeepSpeed is not needed.
        offload: keep what is shared of masters, moments and average in the host's memory, and step there.
        options: a JSON file with more of DeepSpeed's `zero_optimization`, such as bucket sizes.
    """

    zero: int = 0
    offload: bool = False
    options: str | None = None

    def __post_init__(self) -> None:
        if self.zero not in STAGES:
            raise ValueError(f"scale zero is {self.zero}: must be one of 0, 1, 2, 3")
        if not self.zero and (self.offload or self.options):
            what = "offload is true" if self.offload else f"options is {self.options!r}"
            raise ValueError(f"scale {what}: that is ZeRO's, and zero is 0; give a stage")
        self.read()

    def read(self) -> dict[str, Any]:
        """What the file adds. Raises: ValueError for one that cannot be used."""
        if self.options is None:
            return {}
        try:
            table = json.loads(Path(self.options).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"scale options is {self.options!r}: cannot be read ({error})") from None
        taken = {"stage", "offload_optimizer", "offload_param"}
        if not isinstance(table, dict) or taken & table.keys():
            what = f"scale options is {self.options!r}: must be a table of zero_optimization"
            raise ValueError(f"{what} without {', '.join(sorted(taken))}")
        return table

    def check(self, ranks: Ranks) -> None:
        """Raise ValueError, before anything is loaded, where this cannot be run."""
        if not self.zero:
            return
        if importlib.util.find_spec("deepspeed") is None:
            what = f"scale zero is {self.zero}: that needs DeepSpeed"
            raise ValueError(f'{what}; pip install "realign[deepspeed]", or take zero = 0')
        if not dist.is_initialized():
            what = f"scale zero is {self.zero}: this process was started alone"
            raise ValueError(f"{what}; start it with torchrun or deepspeed, or take zero = 0")


def build_optimizer(
    policy: Policy,
    build: Callable[[Sequence[Tensor]], AveragedAdamW],
    clip: float,
    ranks: Ranks,
    scale: ScaleOptions,
) -> Optimizer:
    """The optimiser of a policy's masters that the options ask for."""
    if not scale.zero:
        return WholeOptimizer(policy, build, clip, ranks)
    scale.check(ranks)
    return ZeroOptimizer(policy, build, clip, ranks, scale)


class ZeroOptimizer(Optimizer):
    """Masters that DeepSpeed owns."""

    def __init__(
        self,
        policy: Policy,
        build: Callable[[Sequence[Tensor]], AveragedAdamW],
        clip: float,
        ranks: Ranks,
        scale: ScaleOptions,
    ) -> None:
        self.policy, self.ranks, self.stage = policy, ranks, scale.zero
        policy.shard(self._read_masters)
        self.adamw = build(list(policy.masters.values()))
        self.has_gradient = False  # that this process handed over since the last step
        self.adamw.is_moved = False  # DeepSpeed takes steps of its own while it begins
        self.module = _Masters(policy.masters, ranks.size)
        self.deepspeed = _import_deepspeed(ranks.device)
        self.engine, *_ = self.deepspeed.initialize(
            model=self.module, optimizer=self.adamw, config=_configure(scale, clip)
        )
        # DeepSpeed looks for the moments, of all groups, after the first step of the first group alone.
        self.adamw.prepare([p for group in self.adamw.param_groups for p in group["params"]])
        self._hand_over()
        self._step()

    def collect(self) -> None:
        self.ranks.sum(torch.ones((), device=self.ranks.device))
        self._hand_over()

    def step(self, rate: float, decay: float) -> float:
        while self._are_others_collecting():
            self._hand_over()
        self.adamw.set_rates(rate, decay)
        self._step()
        return float(self.engine.get_global_grad_norm())

    def averages(self) -> Pieces:
        if not self.adamw.has_average:
            yield from self._read_masters()
            return
        for piece in split_pieces(self.policy.masters, PIECE):
            yield {name: self._gather(master, "average") for name, master in piece.items()}

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        step = next(iter(self.adamw.state.values()))["step"]
        for name, master in self.policy.masters.items():
            state = {key: self._gather(master, key) for key in self._list_keys()}
            if self.ranks.is_first:
                own = {**state, "step": step}
                found |= {name_state(name, key): tensor.to("cpu", copy=True) for key, tensor in own.items()}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        steps = {float(value) for key, value in tensors.items() if key.startswith("optimizer.step.")}
        assert len(steps) == 1, "all masters are changed at every step"
        for state in self.adamw.state.values():
            state["step"].fill_(*steps)
        for name, master in self.policy.masters.items():
            for key in self._list_keys():
                self._scatter(master, key, tensors[name_state(name, key)].to(self.ranks.device))

    def _list_keys(self) -> list[str]:
        return ["master", *MOMENTS, *(["average"] if self.adamw.has_average else [])]

    def _read_masters(self) -> Pieces:
        for piece in split_pieces(self.policy.masters, PIECE):
            with self._whole(list(piece.values())):
                yield {name: master.detach() for name, master in piece.items()}

    def _whole(self, masters: list[nn.Parameter], writer: int | None = None) -> AbstractContextManager[None]:
        """While masters are whole on every process; what `writer` writes into them stays."""
        if self.stage < 3:
            return nullcontext()
        return self.deepspeed.zero.GatheredParameters(masters, modifier_rank=writer)

    def _gather(self, master: nn.Parameter, key: str) -> Tensor:
        utils = self.deepspeed.utils
        if key == "master":
            return utils.safe_get_full_fp32_param(master)
        return utils.safe_get_full_optimizer_state(master, key)

    def _scatter(self, master: nn.Parameter, key: str, saved: Tensor) -> None:
        """Each process keeps its own part of a tensor that all have."""
        utils = self.deepspeed.utils
        kind = "full"
        if self.stage == 3:  # parts are of one size, the last one's end is padding
            kind, size = "local", master.partition_numel()
            part = saved.flatten()[self.ranks.rank * size :][:size]
            part = nn.functional.pad(part, (0, size - part.numel()))
        else:
            part = saved
        if key == "master":
            getattr(utils, f"safe_set_{kind}_fp32_param")(master, part)
            with self._whole([master], writer=0):
                master.copy_(saved)
        else:
            getattr(utils, f"safe_set_{kind}_optimizer_state")(master, part, key)

    def _are_others_collecting(self) -> bool:
        """Whether any process still has gradients: all hand over together, this one nothing from now on."""
        return bool(self.ranks.sum(torch.zeros((), device=self.ranks.device)) > 0)

    def _hand_over(self) -> None:
        """The leaves' gradients, zeros where there are none, are added to the masters'."""
        given = [leaf.grad.any() for leaf in self.policy.leaves.values() if leaf.grad is not None]
        self.has_gradient |= bool(given) and bool(torch.stack(given).any())
        for owner, leaf in zip(self.module.owners, self.policy.leaves.values(), strict=True):
            owner.gradient, leaf.grad = leaf.grad, None
        self.engine.backward(self.engine())

    def _step(self) -> None:
        """Of all groups, if any process has a gradient of any: DeepSpeed takes them one after another."""
        total = self.ranks.sum(torch.tensor(float(self.has_gradient), device=self.ranks.device))
        self.adamw.is_moved, self.has_gradient = bool(total > 0), False
        self.engine.step()


class _Masters(nn.Module):
    """The masters as DeepSpeed sees them: a chain of modules, so that it gathers them one after another."""

    def __init__(self, masters: Mapping[str, nn.Parameter], size: int) -> None:
        super().__init__()
        self.owners = nn.ModuleList(_Owner(master, size) for master in masters.values())

    def forward(self) -> Tensor:
        """A number whose gradient is what the owners were given."""
        number = torch.zeros((), device=self.owners[0].master.device, requires_grad=True)
        for owner in self.owners:
            number = owner(number)
        return number


class _Owner(nn.Module):
    """Owns a master; `gradient` is what its next backward gives it."""

    def __init__(self, master: nn.Parameter, size: int) -> None:
        super().__init__()
        self.master, self.size = master, size
        self.gradient: Tensor | None = None

    def forward(self, number: Tensor) -> Tensor:
        gradient, self.gradient = self.gradient, None
        return _GiveGradient.apply(number, self.master, gradient, self.size)


class _GiveGradient(torch.autograd.Function):
    """The number as it is, and the given gradient, times the processes, as DeepSpeed takes their mean."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, master: Tensor, gradient: Tensor | None, size: int) -> Tensor:
        ctx.gradient, ctx.shape, ctx.size = gradient, master.shape, size
        return number.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In float32 one at a time, and no longer than DeepSpeed has need of it.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            return grad, torch.zeros(ctx.shape, device=grad.device), None, None
        return grad, ctx.size * gradient.float(), None, None


def _import_deepspeed(device: str) -> Any:
    """For a kind of device, quiet unless something is wrong."""
    os.environ.setdefault("DS_ACCELERATOR", device.split(":")[0])
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # its calls of torch
    # Processes of one machine without a GPU would compile this one, for minutes, to talk faster.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _configure(scale: ScaleOptions, clip: float) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {"overlap_comm": False, "stage3_param_persistence_threshold": 0}
    zero["sub_group_size"] = 10**12  # what each process has of a group is changed in one piece
    zero |= {**scale.read(), "stage": scale.zero}
    if scale.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # an update is whatever was handed over before a step
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # that one would be compiled where it is first used
        "zero_optimization": zero,
    }
