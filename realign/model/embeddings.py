"""What turns numbers into decoder tokens: times, places, ViT features.

Shapes: `L` packed tokens, `E` model width, `F` sinusoid features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from realign.model.linear import RowLinear

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def find_activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation that a config names (`connector_act`, `hidden_act`)."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: use one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class TimestepEmbedder(nn.Module):
    """Flow time to model width, as DiT: `[cos(t w), sin(t w)]`, `w_i = 10000^(-i / 128)`, then an MLP."""

    num_features = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(RowLinear(self.num_features, width), nn.SiLU(), RowLinear(width, width))

    def forward(self, timestep_L: torch.Tensor) -> torch.Tensor:
        """Times in [0, 1], shape [L], to [L, E]; the sinusoids are computed in float32."""
        half = self.num_features // 2
        index_F = torch.arange(half, dtype=torch.float32, device=timestep_L.device)
        frequency_F = torch.exp(-math.log(10000) * index_F / half)
        angle_LF = timestep_L.float()[:, None] * frequency_F
        features_LF = torch.cat([angle_LF.cos(), angle_LF.sin()], dim=-1)
        return self.mlp(features_LF.to(self.mlp[0].weight.dtype))


class PositionEmbedding(nn.Module):
    """A frozen table of 2-D sin-cos embeddings, one row per place of a `side` x `side` grid, row-major.

    The first half of the width encodes the column, the second the row; it is stored in the checkpoint.
    """

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(build_sincos_table(side, width), requires_grad=False)

    def forward(self, position_L: torch.Tensor) -> torch.Tensor:
        """Flattened places [L] to [L, E]."""
        return self.pos_embed.index_select(0, position_L)


class Connector(nn.Module):
    """ViT features to decoder tokens: a two-layer MLP."""

    def __init__(self, width_in: int, width_out: int, activation: str) -> None:
        super().__init__()
        self.activation = find_activation(activation)
        self.fc1 = RowLinear(width_in, width_out)
        self.fc2 = RowLinear(width_out, width_out)

    def forward(self, hidden_LE: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_LE)))


def build_sincos_table(side: int, width: int) -> torch.Tensor:
    """[side^2, width] float32: sin and cos of the column, then of the row; `w_i = 10000^(-4 i / width)`."""
    quarter = width // 4
    frequency_F = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angle_SF = torch.arange(side, dtype=torch.float64)[:, None] * frequency_F
    line_SE = torch.cat([angle_SF.sin(), angle_SF.cos()], dim=-1).float()
    column_SSE = line_SE[None, :, :].expand(side, side, -1)
    row_SSE = line_SE[:, None, :].expand(side, side, -1)
    return torch.cat([column_SSE, row_SSE], dim=-1).reshape(side * side, width)


def flattened_position_ids(
    height: int, width: int, max_per_side: int, interpolate: bool = False
) -> torch.Tensor:
    """Rows of a position table for a grid of patches, in row-major order: int64 [height * width].

    By default patch (i, j) has row `i * max_per_side + j`; with `interpolate` the grid is stretched over the
    whole table. Raises `ValueError` where the grid is larger than the table.
    """
    if not 0 < min(height, width) <= max(height, width) <= max_per_side:
        raise ValueError(f"a grid of {height}x{width} patches: each side must be from 1 to {max_per_side}")
    rows, columns = (_side_positions(count, max_per_side, interpolate) for count in (height, width))
    return (rows[:, None] * max_per_side + columns).flatten()


def _side_positions(count: int, max_per_side: int, interpolate: bool) -> torch.Tensor:
    if not interpolate:
        return torch.arange(count)
    # Which of `max_per_side` equal bins the fraction i / count falls into. In float32 steps, as BAGEL's
    # training did it: an exact `i * max_per_side // count` differs where a fraction meets a bin's edge.
    edges = torch.arange(1 / max_per_side, 1.0, 1 / max_per_side)
    return torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / count), edges, right=True)
