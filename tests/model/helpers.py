"""What several tests here need."""

from __future__ import annotations

import torch


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the expected tensor's scale."""
    return ((value.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
