"""The Qwen2 decoder with two experts per layer.

Every projection, norm and MLP exists once for understanding (text and ViT tokens) and once for generation
(VAE tokens); attention is common. The hidden states stay apart, one tensor per expert, through all layers;
only queries, keys and values are put together in packed order for attention, which the caller gives (a KV
cache in the runtime, a mask in training).

Shapes: `L` packed tokens (in `parts`: the tokens of one expert), `E` width, `H` query heads, `K` KV heads,
`D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from realign.model.config import LLMConfig
from realign.model.linear import RowLinear
from realign_kernels import apply_rope, rms_norm, swiglu

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Parts = list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class Route:
    """Which packed tokens go to which expert.

    Together the two indexes name each of 0..L-1 once; either may be empty, and then nothing is gathered.
    """

    und_index_L: torch.Tensor
    gen_index_L: torch.Tensor

    @classmethod
    def from_mask(cls, is_gen_L: torch.Tensor) -> Route:
        """From a boolean per token: true goes to the generation expert."""
        return cls(torch.nonzero(~is_gen_L)[:, 0], torch.nonzero(is_gen_L)[:, 0])

    @cached_property
    def length(self) -> int:
        return len(self.und_index_L) + len(self.gen_index_L)

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """The experts that have tokens: the order of `Parts`."""
        return tuple(
            name for name, index_L in (("und", self.und_index_L), ("gen", self.gen_index_L)) if len(index_L)
        )

    @cached_property
    def inverse_L(self) -> torch.Tensor:
        """Where each packed token lies in the two parts put after each other."""
        return torch.argsort(torch.cat([self.und_index_L, self.gen_index_L]))

    def split(self, packed_L: torch.Tensor) -> Parts:
        """Packed tokens [L, ...] to one tensor per expert that has any."""
        if len(self.experts) < 2:
            return [packed_L] if self.experts else []
        return list(_Split.apply(packed_L, self))

    def join(self, parts: Parts) -> torch.Tensor:
        """The reverse of `split`."""
        return parts[0] if len(parts) == 1 else _Join.apply(*parts, self)


class _Split(torch.autograd.Function):
    """A permutation, so its gradient is the reverse one: no scatter-add, which is what autograd would do."""

    @staticmethod
    def forward(ctx: Any, packed_L: torch.Tensor, route: Route) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.route = route
        return packed_L.index_select(0, route.und_index_L), packed_L.index_select(0, route.gen_index_L)

    @staticmethod
    def backward(ctx: Any, grad_und_L: torch.Tensor, grad_gen_L: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Join.apply(grad_und_L, grad_gen_L, ctx.route), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, und_L: torch.Tensor, gen_L: torch.Tensor, route: Route) -> torch.Tensor:
        ctx.route = route
        return torch.cat([und_L, gen_L]).index_select(0, route.inverse_L)

    @staticmethod
    def backward(ctx: Any, grad_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return (*_Split.apply(grad_L, ctx.route), None)


@dataclass(frozen=True, eq=False)
class RopeTable:
    """cos and sin of the tokens' angles, float32 [L, D], both halves alike."""

    cos_LD: torch.Tensor
    sin_LD: torch.Tensor

    @classmethod
    def build(cls, position_L: torch.Tensor, head_dim: int, theta: float) -> RopeTable:
        """Angles `position * theta^(-2 i / D)` (arXiv 2104.09864), in float32 whatever the model's dtype."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_L.device) / head_dim
        angle = position_L.float()[:, None] * (1.0 / theta**exponent)
        angle_LD = torch.cat([angle, angle], dim=-1)
        return cls(angle_LD.cos(), angle_LD.sin())

    def turn(self, heads_LHD: torch.Tensor) -> torch.Tensor:
        return apply_rope(heads_LHD, self.cos_LD, self.sin_LD)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden, self.weight, self.eps)


class Expert(nn.Module):
    """One expert's half of a layer: what happens to its tokens before and after the common attention."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        width, head_dim, eps = config.hidden_size, config.head_dim, config.rms_norm_eps
        self.head_dim = head_dim
        self.input_norm = RMSNorm(width, eps)
        self.q_proj = RowLinear(width, config.num_attention_heads * head_dim)
        self.k_proj = RowLinear(width, config.num_key_value_heads * head_dim)
        self.v_proj = RowLinear(width, config.num_key_value_heads * head_dim)
        self.q_norm = RMSNorm(head_dim, eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps) if config.qk_norm else nn.Identity()
        self.o_proj = RowLinear(config.num_attention_heads * head_dim, width, bias=False)
        self.post_attention_norm = RMSNorm(width, eps)
        self.gate_proj = RowLinear(width, config.intermediate_size, bias=False)
        self.up_proj = RowLinear(width, config.intermediate_size, bias=False)
        self.down_proj = RowLinear(config.intermediate_size, width, bias=False)

    def project(
        self, hidden_LE: torch.Tensor, rope: RopeTable
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [L, H, D], key and value [L, K, D]; query and key normed per head and turned."""
        normed_LE = self.input_norm(hidden_LE)
        query, key, value = (
            proj(normed_LE).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rope.turn(self.q_norm(query)), rope.turn(self.k_norm(key)), value

    def finish(self, hidden_LE: torch.Tensor, attended_LHD: torch.Tensor) -> torch.Tensor:
        """Output projection and MLP, each added to the residual stream."""
        hidden_LE = hidden_LE + self.o_proj(attended_LHD.flatten(1))
        normed_LE = self.post_attention_norm(hidden_LE)
        return hidden_LE + self.down_proj(swiglu(self.gate_proj(normed_LE), self.up_proj(normed_LE)))


class MoTLayer(nn.Module):
    """Mixture-of-Transformers (arXiv 2411.04996; BAGEL, arXiv 2505.14683)."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.und = Expert(config)
        self.gen = Expert(config)

    def forward(self, parts: Parts, ropes: list[RopeTable], route: Route, attend: Callable) -> Parts:
        """`attend(query_LHD, key_LKD, value_LKD) -> attended_LHD` sees all tokens in packed order."""
        experts: Iterable[Expert] = [getattr(self, name) for name in route.experts]
        projected = [e.project(part, rope) for e, part, rope in zip(experts, parts, ropes, strict=True)]
        query_LHD, key_LKD, value_LKD = (
            route.join(list(tensors)) for tensors in zip(*projected, strict=True)
        )
        attended = route.split(attend(query_LHD, key_LKD, value_LKD))
        return [e.finish(part, out) for e, part, out in zip(experts, parts, attended, strict=True)]


class MixtureOfTransformers(nn.Module):
    """All layers and the final norm of each expert."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MoTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.ModuleDict(
            {name: RMSNorm(config.hidden_size, config.rms_norm_eps) for name in ("und", "gen")}
        )

    def forward(
        self, hidden_LE: torch.Tensor, position_L: torch.Tensor, route: Route, attend: Attend
    ) -> torch.Tensor:
        """Packed token embeddings to final hidden states, normed.

        Args:
            hidden_LE: embeddings in packed order, any float dtype.
            position_L: int64, rotary positions; all tokens of a picture share one.
            route: which tokens are generation tokens.
            attend: `attend(layer, query_LHD, key_LKD, value_LKD) -> attended_LHD`; it serves the grouped
                heads, the masks and the cache. Query and key come normed and turned.
        Raises: `ValueError` if the route or the positions are for another number of tokens.
        """
        if not len(hidden_LE) == len(position_L) == route.length:
            raise ValueError(
                f"{len(hidden_LE)} tokens, {len(position_L)} positions, a route for {route.length}: not equal"
            )
        if not route.length:
            return hidden_LE
        ropes = [
            RopeTable.build(part_L, self.config.head_dim, self.config.rope_theta)
            for part_L in route.split(position_L)
        ]
        parts = route.split(hidden_LE)
        for index, layer in enumerate(self.layers):
            parts = layer(parts, ropes, route, lambda q, k, v, index=index: attend(index, q, k, v))
        return route.join([self.norm[name](part) for name, part in zip(route.experts, parts, strict=True)])
