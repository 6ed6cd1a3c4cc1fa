"""The Qwen2 decoder with two experts per layer.

Every projection, norm and MLP exists once for understanding (text and ViT tokens) and once for generation
(VAE tokens); attention is common. Through all layers the hidden states lie in one tensor in the order of the
experts, understanding's tokens first: a projection works on its expert's part, a norm on all at once. Only
queries, keys and values are put in packed order, for attention, which the caller gives (a KV cache in the
runtime, a mask in training).

Shapes: `L` tokens, `E` width, `H` query heads, `K` KV heads, `D` head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from realign.model.config import LLMConfig
from realign.model.fp8 import Fp8Expert
from realign.model.linear import FusedLinear, RowLinear
from realign.model.route import EXPERTS, Route
from realign_kernels import QKNorm, RopeTable, mot_norm, mot_rope, swiglu

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class NormWeight(nn.Module):
    """The weight of an RMS norm; `mot_norm` and `mot_rope` take both experts' at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Expert(nn.Module):
    """One expert's half of a layer: its weights."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        query_size, key_size = (
            heads * head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.input_norm = NormWeight(width)
        self.qkv_proj = FusedLinear(width, {"q_proj": query_size, "k_proj": key_size, "v_proj": key_size})
        self.q_norm = NormWeight(head_dim) if config.qk_norm else None
        self.k_norm = NormWeight(head_dim) if config.qk_norm else None
        self.o_proj = RowLinear(query_size, width, bias=False)
        self.post_attention_norm = NormWeight(width)
        halves = dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size)
        self.gate_up_proj = FusedLinear(width, halves, bias=False)
        self.down_proj = RowLinear(config.intermediate_size, width, bias=False)

    def mlp(self, normed_LE: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(normed_LE)))


class MoTLayer(nn.Module):
    """Mixture-of-Transformers (arXiv 2411.04996; BAGEL, arXiv 2505.14683).

    Between layers go the residual stream and what is still to be added to it, which the next norm does.

    Attributes:
        fp8: does what the generation expert does, where `realign.model.fp8.use_fp8` has switched it on.
    """

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.head_dim, self.eps, self.has_qk_norm = config.head_dim, config.rms_norm_eps, config.qk_norm
        key_heads = config.num_key_value_heads
        self.num_heads = (config.num_attention_heads, key_heads, key_heads)  # of queries, keys, values
        self.und = Expert(config)
        self.gen = Expert(config)
        self.fp8: Fp8Expert | None = None

    def forward(
        self,
        hidden_LE: torch.Tensor,
        update_LE: torch.Tensor | None,
        rope: RopeTable,
        route: Route,
        attend: Callable,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`attend(query_LHD, key_LKD, value_LKD) -> attended_LHD` sees all tokens in packed order."""
        hidden_LE, *heads = self.project(hidden_LE, update_LE, rope, route)
        return self.finish(hidden_LE, attend(*heads), route)

    def project(
        self, hidden_LE: torch.Tensor, update_LE: torch.Tensor | None, rope: RopeTable, route: Route
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The residual stream; query [L, H, D], normed and turned, key and value [L, K, D], packed.

        Values may lie apart by more than a row of their own: with one expert they are where the product is.
        """
        hidden_LE, normed = self._norm("input_norm", hidden_LE, update_LE, route)
        heads = self._each(route, normed, lambda expert, part_LE: expert.qkv_proj(part_LE))
        query, key, value = heads.unflatten(-1, (-1, self.head_dim)).split(self.num_heads, dim=1)
        norm = None
        if self.has_qk_norm:
            norm = QKNorm(self._weights("q_norm", route), self._weights("k_norm", route), self.eps)
        query, key = mot_rope(query, key, rope, norm, route.expert_L, route.packed_index_L)
        return hidden_LE, query, key, route.pack(value)

    def finish(
        self, hidden_LE: torch.Tensor, attended_LHD: torch.Tensor, route: Route
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output projection and MLP: the residual stream, and what is to be added to it."""
        attended = route.split(route.unpack(attended_LHD.flatten(1)))
        update_LE = self._each(route, attended, lambda expert, part_LE: expert.o_proj(part_LE))
        hidden_LE, normed = self._norm("post_attention_norm", hidden_LE, update_LE, route)
        return hidden_LE, self._each(route, normed, lambda expert, part_LE: expert.mlp(part_LE))

    def _norm(
        self, norm: str, hidden_LE: torch.Tensor, update_LE: torch.Tensor | None, route: Route
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The residual stream with the update added, and each expert's part of its norm."""
        if self.fp8 is None or "gen" not in route.experts:
            weights = self._weights(norm, route)
            hidden_LE, normed_LE = add_and_norm(hidden_LE, update_LE, weights, self.eps, route)
            return hidden_LE, route.split(normed_LE)
        weights = [getattr(expert, norm).weight for expert in (self.und, self.gen)]
        rows = (hidden_LE, None) if update_LE is None else (update_LE, hidden_LE)
        return self.fp8.norm(norm, *rows, weights, route.length - route.sizes[-1], self.eps)

    def _each(
        self,
        route: Route,
        parts: Sequence[torch.Tensor],
        function: Callable[[Expert | Fp8Expert, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Each expert's function of its own tokens."""
        experts = {"und": self.und, "gen": self.fp8 or self.gen}
        results = [function(experts[name], part) for name, part in zip(route.experts, parts, strict=True)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _weights(self, norm: str, route: Route) -> list[torch.Tensor]:
        return [getattr(getattr(self, name), norm).weight for name in route.experts]


def add_and_norm(
    hidden_LE: torch.Tensor,
    update_LE: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    eps: float,
    route: Route,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream with the update added, and its norm."""
    if update_LE is None:
        return hidden_LE, mot_norm(hidden_LE, weights, eps, route.expert_L)
    normed_LE, hidden_LE = mot_norm(update_LE, weights, eps, route.expert_L, residual_LE=hidden_LE)
    return hidden_LE, normed_LE


class MixtureOfTransformers(nn.Module):
    """All layers and the final norm of each expert."""

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MoTLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.ModuleDict({name: NormWeight(config.hidden_size) for name in EXPERTS})

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
        rope = RopeTable.build(route.unpack(position_L), self.config.head_dim, self.config.rope_theta)
        hidden_LE, update_LE = route.unpack(hidden_LE), None
        for index, layer in enumerate(self.layers):
            hidden_LE, update_LE = layer(
                hidden_LE, update_LE, rope, route, lambda q, k, v, index=index: attend(index, q, k, v)
            )
        weights = [self.norm[name].weight for name in route.experts]
        _, normed_LE = add_and_norm(hidden_LE, update_LE, weights, self.config.rms_norm_eps, route)
        return route.pack(normed_LE)
