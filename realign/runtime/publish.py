"""New weights for a running engine, written in place: what was captured or laid out on them stays valid.

A publish is all or nothing: every name, shape, dtype and number is checked, and all memory that it takes is
had, before the first weight changes. It happens between batches. Contexts that were read with the weights
before are refused from then on (`kv.check_current`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from realign.model.bagel import Bagel
from realign.model.weights import Part, list_parts

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class LoRA:
    """A change of one projection's weight: `scale * up @ down` (Hu et al., arXiv 2106.09685, eq. 3).

    Attributes:
        down_RI: A, [rank, inputs].
        up_OR: B, [outputs, rank].
        scale: alpha / rank, where these are given.
    """

    down_RI: Tensor
    up_OR: Tensor
    scale: float = 1.0


@dataclass(eq=False)
class Use:
    """What all publishers of a model know of it.

    Attributes:
        parts: by each of their names.
        bases: of the weights that adapters are merged into.
        num_users: batches that run.
    """

    parts: dict[str, list[Part]]
    bases: dict[Part, Tensor] = field(default_factory=dict)
    num_users: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, model: Bagel) -> Use:
        if model not in _USES:
            parts: dict[str, list[Part]] = {}
            for published, part in list_parts(model).items():
                for name in {published, part.name, part.parameter}:
                    parts.setdefault(name, []).append(part)
            _USES[model] = cls(parts)
        return _USES[model]


_USES: WeakKeyDictionary[Bagel, Use] = WeakKeyDictionary()


class Publisher:
    """Changes the weights of a model that others run; those of one model know of each other.

    Tensors and adapters are named as the model names its parameters, or as published checkpoints do; the
    projections of a fused one by themselves (`decoder.layers.0.gen.q_proj.weight`) or together
    (`decoder.layers.0.gen.qkv_proj.weight`).
    """

    def __init__(self, model: Bagel) -> None:
        self.model = model
        self.use = Use.of(model)
        self._state: dict[str, Tensor] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While a batch runs: what is published then is refused."""
        with self.use.lock:
            self.use.num_users += 1
        try:
            yield
        finally:
            with self.use.lock:
                self.use.num_users -= 1

    @torch.no_grad()
    def publish(
        self, weights: Mapping[str, Tensor] | None = None, lora: Mapping[str, LoRA] | None = None
    ) -> int:
        """Write tensors, and merge adapters: `W = base + scale * up @ down` in float32, rounded once.

        Args:
            weights: some or all tensors, float, on any device; they have no adapter then but one in `lora`.
            lora: all adapters there are to be, by linear, with or without `.weight`: those of an earlier
                publish that are not among them are taken out, bit for bit. None leaves them in.

        Returns: the new version of the weights.
        Raises: ValueError naming the tensor, with everything as it was; also while a batch runs.
        """
        with self.use.lock:
            if self.use.num_users:
                raise ValueError("a batch is running: publish weights before it or after it")
            self._state = self.model.state_dict()
            given = self._find_weights(weights or {})
            adapters = self._find_adapters(lora or {})
            bases = {part: self._find_base(part, given) for part in adapters}
            merges = [_Merge.build(self._rows(part), bases[part], adapters[part]) for part in adapters]
            scratch = _make_scratch(merges)
            old = [part for part in self.use.bases if part not in adapters]
            ended = [part for part in old if lora is not None or part in given]
            for part in ended:
                base = self.use.bases.pop(part)
                if part not in given:  # which may be the very weights that the adapter is merged into
                    self._rows(part).copy_(base)
            for part, tensor in given.items():
                self._rows(part).copy_(tensor)
            for merge in merges:
                merge.write(scratch)
            self.use.bases.update(bases)
            changed = {part.parameter for part in (*ended, *given, *adapters)}
            return self.model.announce_weights(changed)

    def _rows(self, part: Part) -> Tensor:
        return part.of(self._state)

    def _find_base(self, part: Part, given: Mapping[Part, Tensor]) -> Tensor:
        """What an adapter is merged into: new memory, unless an earlier one's base is still it."""
        if part in given:
            return given[part].to(self._rows(part), copy=True)
        return self.use.bases[part] if part in self.use.bases else self._rows(part).clone()

    def _find_weights(self, weights: Mapping[str, Tensor]) -> dict[Part, Tensor]:
        """Each part's tensor, checked."""
        found: dict[Part, Tensor] = {}
        for name, tensor in weights.items():
            parts = self._find_parts(name, name, found)
            if len(parts) > 1:
                _check(name, tensor, self._state[parts[0].parameter].shape)
                found.update({part: tensor[part.rows] for part in parts})
            else:
                _check(name, tensor, self._rows(parts[0]).shape)
                found[parts[0]] = tensor
        return found

    def _find_adapters(self, lora: Mapping[str, LoRA]) -> dict[Part, LoRA]:
        """Each part's adapter, checked."""
        found: dict[Part, LoRA] = {}
        for name, adapter in lora.items():
            parts = self._find_parts(f"{name.removesuffix('.weight')}.weight", name, found)
            if not isinstance(self.model.get_submodule(parts[0].parameter.rpartition(".")[0]), nn.Linear):
                raise ValueError(f"{name} is no linear layer: it takes no LoRA")
            rows = sum(len(self._rows(part)) for part in parts)
            inputs = self._rows(parts[0]).shape[1]
            rank = adapter.down_RI.shape[0] if adapter.down_RI.dim() else 0
            _check(f"{name}: down_RI", adapter.down_RI, (rank, inputs))
            _check(f"{name}: up_OR", adapter.up_OR, (rows, rank))
            if not math.isfinite(adapter.scale):
                raise ValueError(f"{name}: scale is {adapter.scale}: must be finite")
            for part in parts:
                up_OR = adapter.up_OR[part.rows] if len(parts) > 1 else adapter.up_OR
                found[part] = LoRA(adapter.down_RI, up_OR, adapter.scale)
        return found

    def _find_parts(self, full_name: str, name: str, found: Mapping[Part, object]) -> Sequence[Part]:
        parts = self.use.parts.get(full_name)
        if parts is None:
            raise ValueError(f"{name}: the model has none of this name, nor has a published checkpoint")
        if any(part in found for part in parts):
            raise ValueError(f"{name} is given twice, under two names")
        return parts


@dataclass(frozen=True, eq=False)
class _Merge:
    """Where `base + scale * up @ down` goes, and all that it takes, on the model's device."""

    rows_OI: Tensor
    base_OI: Tensor
    up_OR: Tensor
    down_RI: Tensor
    scale: float

    @classmethod
    def build(cls, rows_OI: Tensor, base_OI: Tensor, adapter: LoRA) -> _Merge:
        up_OR, down_RI = (t.to(rows_OI.device, torch.float32) for t in (adapter.up_OR, adapter.down_RI))
        return cls(rows_OI, base_OI, up_OR, down_RI, adapter.scale)

    def write(self, scratch: Tensor) -> None:
        sum_OI = scratch[: self.rows_OI.numel()].view(self.rows_OI.shape).copy_(self.base_OI)
        self.rows_OI.copy_(sum_OI.addmm_(self.up_OR, self.down_RI, alpha=self.scale))


def _make_scratch(merges: Sequence[_Merge]) -> Tensor | None:
    """Float32 room for the largest sum."""
    if not merges:
        return None
    size = max(merge.rows_OI.numel() for merge in merges)
    return torch.empty(size, dtype=torch.float32, device=merges[0].rows_OI.device)


def _check(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}: must be float32, bfloat16, float16 or float64")
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} is {list(tensor.shape)}, the model asks for {list(shape)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds numbers that are not finite")
