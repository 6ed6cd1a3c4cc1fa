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
    """A function of no arguments; on a CUDA device its second call records a CUDA graph, which is replayed.

    It must read and write the same tensors every time, wait for nothing on the host, and be right to call
    once a step: it is never run more often than it is called. Elsewhere, or where it `is_worth` nothing, it
    is called as it is.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device, is_worth: bool = True) -> None:
        self.function = function
        self.is_captured = is_worth and device.type in CAPTURED_DEVICES
        self.num_calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Result

    def __call__(self) -> Result:
        """The function's result; of a replay the same tensors, written anew."""
        self.num_calls += 1
        # The first call prepares what is prepared once (kernels are compiled, workspaces made).
        if not self.is_captured or self.num_calls == 1:
            return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self.function()
        self.graph.replay()
        return self.result
