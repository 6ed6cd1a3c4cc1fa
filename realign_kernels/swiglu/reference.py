"""Definition of `swiglu` in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, in the dtype of the inputs."""
    return silu(gate) * up
