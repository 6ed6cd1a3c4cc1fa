"""Steps that are recorded once and replayed: at small sizes launching a step costs more than its work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")

# Tokens of a forward above which launches cost nothing: they run ahead of the device.
MAX_GRAPH_TOKENS = 16384
CAPTURED_DEVICES = ("cuda",)


class CapturedStep(Generic[Result]):
    """A function of no arguments that a CUDA device records as a graph, which is replayed from then on.

    It must read and write the same tensors every time, wait for nothing on the host, and be right to call
    once a step: it is never run more often than it is called. On other devices, or where recording `is_worth`
    nothing, it is called as it is.

    Args:
        num_before: calls before it is recorded, at least one: what is prepared once (kernels are compiled,
            workspaces made) happens then. More where a step may not last.
    """

    def __init__(
        self, function: Callable[[], Result], device: torch.device, is_worth: bool = True, num_before: int = 1
    ) -> None:
        self.function, self.device = function, device
        self.is_captured = is_worth and device.type in CAPTURED_DEVICES
        self.num_before = num_before
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Result

    def __call__(self) -> Result:
        """The function's result; of a replay the same tensors, written anew."""
        if not self.is_captured:
            return self.function()
        if self.num_before:
            self.num_before -= 1
            return self.function()
        with torch.cuda.device(self.device):
            if self.graph is None:
                self._record()
            self.graph.replay()
        return self.result

    def _record(self) -> None:
        """Other threads may use the device meanwhile: what they do is not recorded."""
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = self.function()
