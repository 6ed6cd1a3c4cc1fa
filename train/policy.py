"""The weights that alignment trains: float32 masters beside the engine's model.

The engine runs on the masters' values, rounded to its dtype when they are published. Gradients of a replay
through the model are added up in the masters' own, in float32, however many forwards an update has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from realign.model.mot import MoTLayer
from realign.model.route import EXPERTS
from realign.runtime.engine import Engine
from realign.runtime.publish import LoRA
from train.lora import Adapter, attach_adapters, draw_adapters

KINDS = ("full", "lora")


@dataclass(frozen=True)
class PolicyOptions:
    """What is trained of the generation expert, and of the understanding expert where texts are trained.

    Attributes:
        kind: "full": all its weights, understanding's with the embeddings and the head of texts; "lora":
            adapters of all its projections (arXiv 2106.09685).
        rank, alpha: of the adapters; their scale is alpha / rank.
        checkpointing: compute a layer again in the backward pass instead of keeping what it computed.
    """

    kind: str = "full"
    rank: int = 32
    alpha: float = 64.0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"policy kind is {self.kind!r}: must be one of {', '.join(KINDS)}")
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"policy rank is {self.rank}, alpha {self.alpha}: must be above 0")


class Policy(ABC):
    """Masters by name, and how they get into the engine.

    Attributes:
        masters: float32, on the model's device; where processes share them, each holds its part alone.
        leaves: by the masters' names, what the engine runs on: whole on every process.
        read_masters: the masters, whole, some tensors at a time.
        is_sharded: whether `shard` was called: gradients stay with the leaves then.
        checkpointing: as in `PolicyOptions`.
    """

    masters: dict[str, nn.Parameter]
    leaves: dict[str, nn.Parameter]
    is_sharded = False
    checkpointing = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.read_masters: Callable[[], Iterable[Mapping[str, Tensor]]] = lambda: [self.masters]
        engine.model.requires_grad_(False)

    def publish(self, pieces: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Let the engine run on these tensors, by default the masters."""
        self._publish(self.read_masters() if pieces is None else pieces)

    def shard(self, read_masters: Callable[[], Iterable[Mapping[str, Tensor]]]) -> None:
        """From now on the masters are apart from the leaves, and their values come from `read_masters`."""
        self.is_sharded, self.read_masters = True, read_masters

    @contextmanager
    def reference(self) -> Iterator[None]:
        """While the engine runs on the weights that training began with."""
        self._publish_reference()
        try:
            yield
        finally:
            self.publish()

    @abstractmethod
    def differentiate(self) -> AbstractContextManager[None]:
        """A context in which what the model computes has a gradient, that goes to the masters."""

    @abstractmethod
    def _publish(self, pieces: Iterable[Mapping[str, Tensor]]) -> None: ...

    @abstractmethod
    def _publish_reference(self) -> None: ...


class FullPolicy(Policy):
    """All weights of the generation expert: its part of every layer, and its final norm.

    Args:
        keeps_reference: whether `reference` will be asked for: it takes another copy, on the host.
        trains_text: the same of the understanding expert, and the embeddings and the head of texts.
    """

    def __init__(self, engine: Engine, keeps_reference: bool, trains_text: bool = False) -> None:
        super().__init__(engine)
        self.leaves = {
            name: parameter
            for name, parameter in engine.model.named_parameters()
            if is_generation(name) or (trains_text and is_understanding(name))
        }
        self.masters = {n: nn.Parameter(p.detach().float().clone()) for n, p in self.leaves.items()}
        self.start = {n: p.detach().to("cpu", copy=True) for n, p in self.leaves.items() if keeps_reference}

    @contextmanager
    def differentiate(self) -> Iterator[None]:
        hooks = []
        for name, weight in self.leaves.items():
            weight.requires_grad_(True)
            if not self.is_sharded:
                hooks.append(weight.register_post_accumulate_grad_hook(_move_to(self.masters[name])))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for weight in self.leaves.values():
                weight.requires_grad_(False)

    def _publish(self, pieces: Iterable[Mapping[str, Tensor]]) -> None:
        for piece in pieces:
            self.engine.publish({name: tensor.detach() for name, tensor in piece.items()})

    def _publish_reference(self) -> None:
        assert self.start
        self.engine.publish(self.start)


class LoRAPolicy(Policy):
    """Adapters of the generation expert's projections, merged into the engine's weights; with `trains_text`
    of the understanding expert's too.

    The forward of a replay runs the merged weights, as the rollout does: its ratio is as exactly one as with
    full weights. Only the backward knows of the adapters (see `train.lora`).
    """

    def __init__(self, engine: Engine, options: PolicyOptions, seed: int, trains_text: bool = False) -> None:
        super().__init__(engine)
        self.scale = options.alpha / options.rank
        experts = sorted(EXPERTS if trains_text else ("gen",))  # gen first: drawn alike with und or without
        self.adapters: dict[str, Adapter] = draw_adapters(engine.model, options.rank, seed, experts)
        self.masters = {}
        for name, adapter in self.adapters.items():
            self.masters |= {f"{name}.down": adapter.down_RI, f"{name}.up": adapter.up_OR}
        self.leaves = dict(self.masters)

    def shard(self, read_masters: Callable[[], Iterable[Mapping[str, Tensor]]]) -> None:
        super().shard(read_masters)
        self.masters = {name: nn.Parameter(leaf.detach().clone()) for name, leaf in self.leaves.items()}

    @contextmanager
    def differentiate(self) -> Iterator[None]:
        with attach_adapters(self.engine.model, self.adapters, self.scale):
            yield

    @torch.no_grad()
    def _publish(self, pieces: Iterable[Mapping[str, Tensor]]) -> None:
        """All adapters at once: those that are left out of a publish would be taken out of the model."""
        tensors: dict[str, Tensor] = {}
        for piece in pieces:
            for name, tensor in piece.items():
                tensors[name] = self.leaves[name].copy_(tensor) if self.is_sharded else tensor.detach()
        lora = {
            name: LoRA(tensors[f"{name}.down"], tensors[f"{name}.up"], self.scale) for name in self.adapters
        }
        self.engine.publish(lora=lora)

    def _publish_reference(self) -> None:
        self.engine.publish(lora={})


def build_policy(
    engine: Engine, options: PolicyOptions, keeps_reference: bool, seed: int, trains_text: bool = False
) -> Policy:
    """The policy that options ask for, published."""
    if options.kind == "full":
        policy: Policy = FullPolicy(engine, keeps_reference, trains_text)
    else:
        policy = LoRAPolicy(engine, options, seed, trains_text)
    policy.checkpointing = options.checkpointing
    policy.publish()
    return policy


def is_generation(name: str) -> bool:
    """Whether a parameter, or an adapter's factor, is the generation expert's."""
    return name.startswith("decoder.") and ".gen." in name


def is_understanding(name: str) -> bool:
    """Whether a parameter reads or writes texts: the understanding expert's, the embeddings, or the head."""
    return name.startswith(("decoder.", "embed_tokens.", "lm_head.")) and ".gen." not in name


@contextmanager
def checkpoint_layers(model: nn.Module, is_on: bool) -> Iterator[None]:
    """While layers keep their inputs alone, and compute the rest again in the backward pass."""
    layers = [module for module in model.modules() if isinstance(module, MoTLayer)] if is_on else []
    for layer in layers:
        layer.forward = _checkpointed(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _checkpointed(forward: Callable) -> Callable:
    def run(*arguments: object) -> object:
        return checkpoint(forward, *arguments, use_reentrant=False)

    return run


def _move_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    """Adds a weight's gradient to its master's, and takes it away."""

    def move(weight: Tensor) -> None:
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        master.grad += weight.grad
        weight.grad = None

    return move
