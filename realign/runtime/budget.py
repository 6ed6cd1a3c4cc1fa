"""Memory: what work takes, what there is, and what to do when there is less than was thought."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from realign.model.bagel import Bagel

# Without being told otherwise, a CPU's memory is left to others.
CPU_BYTES = 2 * 2**30
# Of a CUDA device's memory, left for workspaces, recorded graphs and what fragments leave unused.
RESERVED_SHARE = 0.05
# Measured over derived, of what a forward and the autoencoder hold: copies between experts, layouts, scores.
MARGIN = 2
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")

_SHORTAGES = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


class MemoryShortage(RuntimeError):
    """One request alone does not fit; the text is one line that says what to lower."""


@dataclass(frozen=True)
class Costs:
    """Bytes that work holds, from the model's configuration.

    Attributes:
        kv_token: keys and values of a token, all layers.
        forward_token: what a forward holds at once of a new token, whichever layer it is in.
        scores_row: of a row that writes: the scores of a token, and what it is chosen with.
        pixel: what the autoencoder holds at once of a pixel, decoding it.
    """

    kv_token: int
    forward_token: int
    scores_row: int
    pixel: int

    @property
    def read_token(self) -> int:
        """Of a token that is read: its keys and values are there twice for a while, recorded and cut out."""
        return 2 * self.kv_token + self.forward_token

    @classmethod
    def of(cls, model: Bagel) -> Costs:
        llm, size = model.config.llm, model.dtype.itemsize
        key = llm.num_key_value_heads * llm.head_dim
        query = llm.num_attention_heads * llm.head_dim
        # The residual and its norm stay; beside them the gate, the up projection and their product, or
        # query, key and value, before and after the rotation, and what attention gives.
        mlp, attention = 3 * llm.intermediate_size, 3 * query + 4 * key
        flux = model.config.autoencoder
        # At full size the finest level but one comes in, and its norm and activation stand beside it.
        widest = flux.ch * max(flux.ch_mult[:2])
        return cls(
            kv_token=2 * llm.num_hidden_layers * key * size,
            forward_token=MARGIN * (3 * llm.hidden_size + max(mlp, attention)) * size,
            # float64 weights, before and after sorting, with their order, sums and masks
            scores_row=llm.vocab_size * (size + 4 + MARGIN * 6 * 8),
            pixel=MARGIN * 3 * widest * size + flux.out_ch * (size + 4),
        )


@dataclass
class Budget:
    """How much may be held at a time.

    Attributes:
        limit: bytes, for all that is held beside the weights.
        lowered: by the name of a kind of work, the bytes that one call of it may take since it once failed.
    """

    limit: int
    lowered: dict[str, int] = field(default_factory=dict)

    def room(self, kind: str, held: int) -> int:
        """Bytes that one call may take while so many are held."""
        return max(0, min(self.limit - held, self.lowered.get(kind, self.limit)))

    def lower(self, kind: str, used: int) -> None:
        """A call that would take so many bytes failed: from now on half of it."""
        self.lowered[kind] = used // 2


def find_free_bytes(device: torch.device) -> int:
    """What may be used by default: on CUDA all that is free now, on a CPU `CPU_BYTES` or half of it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(0, free + cached - int(RESERVED_SHARE * total))
    return int(min(CPU_BYTES, _find_available_bytes() / 2))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, or Python's own, says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORTAGES)


def _find_available_bytes() -> float:
    """Of the machine, or of the group of processes that this one is bounded with."""
    found = [math.inf]
    if MEMINFO.exists():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    limit, used = (CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        found.append(max(0, int(limit.read_text()) - int(used.read_text())))
    return min(found)
