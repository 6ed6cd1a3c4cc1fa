"""The processes that train together, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together, and the device it trains on."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    def join(cls, device: str = "auto") -> Ranks:
        """From a launcher's environment, or alone; "auto" is a GPU for each process where there are any.

        Raises: ValueError for a device that is not there.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        _check_device(device)
        if "RANK" not in os.environ:
            return cls(device=device)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        # The others wait while the first writes a checkpoint.
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up over the processes, in place."""
        if self.size > 1:
            there = tensor.to(self.device)  # GPUs add up what lies on them alone
            dist.all_reduce(there)
            if there is not tensor:
                tensor.copy_(there)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The rows of all processes' tensors, in the order of the processes; their numbers may differ."""
        if self.size == 1:
            return tensor
        parts: list[Tensor | None] = [None] * self.size
        dist.all_gather_object(parts, tensor.cpu())
        return torch.cat(parts).to(tensor.device)

    def gather_list(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, in the order of the processes."""
        if self.size == 1:
            return list(items)
        parts: list[Sequence[Item]] = [()] * self.size
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device is {device!r}: it cannot be used here ({reason}); take cpu or auto"
        ) from None
