"""One forward of BAGEL's decoder as the reference runs it, in plain torch, on the weights of our model.

Context and new tokens are merged by copying both into fresh buffers, in every layer; tokens of two experts
are gathered, worked on apart and scattered into zeros, norm by norm (ByteDance-Seed/Bagel,
`modeling/bagel/qwen2_navit.py`, `PackedAttentionMoT.forward_inference`). One thing is kinder to it than it is
itself: lengths are known on the host, so that nothing waits for the device.

L new tokens, C tokens of the context, E width, H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realign.model.bagel import Bagel
from realign.model.config import LLMConfig
from realign.model.linear import FusedLinear

PerToken = Callable[[Tensor], Tensor]


@dataclass
class Cache:
    """What was read: of each layer keys and values [C, K, D]. Reading replaces them by longer copies."""

    length: int = 0
    next_position: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def copy(self) -> Cache:
        """A copy of everything: how the reference keeps a branch."""
        keys, values = ({n: t.clone() for n, t in tensors.items()} for tensors in (self.keys, self.values))
        return replace(self, keys=keys, values=values)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the new tokens of a forward go.

    Attributes:
        position_L: rotary positions.
        query_index_L, past_index_C: places of the new tokens, and of the context, in the merged buffers.
        text_index_L, latent_index_L: the tokens of each expert; None where all are text or ViT tokens.
        mask_LS: what each new token sees, S = C + L; None where it sees all.
    """

    position_L: Tensor
    query_index_L: Tensor
    past_index_C: Tensor
    text_index_L: Tensor | None = None
    latent_index_L: Tensor | None = None
    mask_LS: Tensor | None = None


def lay_out_text(cache: Cache, length: int, device: torch.device) -> Layout:
    """A text of `length` tokens after a context: each sees the context and those before it."""
    everywhere = torch.arange(cache.length + length, device=device)
    mask_LS = None
    if length > 1:
        mask_LS = torch.ones(length, len(everywhere), dtype=torch.bool, device=device).tril(cache.length)
    position_L = torch.arange(cache.next_position, cache.next_position + length, device=device)
    return Layout(position_L, everywhere[cache.length :], everywhere[: cache.length], mask_LS=mask_LS)


def lay_out_picture(cache: Cache, length: int, device: torch.device, is_latent: bool) -> Layout:
    """A picture of `length` tokens, its two markers included: all at one position, and all seen by all."""
    everywhere = torch.arange(cache.length + length, device=device)
    position_L = torch.full((length,), cache.next_position, device=device)
    layout = Layout(position_L, everywhere[cache.length :], everywhere[: cache.length])
    if not is_latent:
        return layout
    own = torch.arange(length, device=device)
    return replace(layout, text_index_L=own[[0, -1]], latent_index_L=own[1:-1])


def run_decoder(
    model: Bagel, hidden_LE: Tensor, layout: Layout, cache: Cache, does_update: bool = False
) -> Tensor:
    """Embedded tokens to final hidden states [L, E], normed; `does_update` keeps what was read."""
    config = model.config.llm
    turn = _build_rope(layout.position_L, config, hidden_LE.dtype)
    for number, layer in enumerate(model.decoder.layers):
        norms = [_norm(expert.input_norm, config) for expert in (layer.und, layer.gen)]
        heads = _project(layer, _by_expert(layout, hidden_LE, *norms), layout, config)
        query_LHD, key_LKD = (turn(part).to(hidden_LE.dtype) for part in heads[:2])
        value_LKD = heads[2]
        key_SKD, value_SKD = _merge(cache, number, key_LKD, value_LKD, layout)
        if does_update:
            cache.keys[number], cache.values[number] = key_SKD, value_SKD
        attended_LE = _attend(query_LHD, key_SKD, value_SKD, layout).flatten(1)
        outs = [as_linear(expert.o_proj) for expert in (layer.und, layer.gen)]
        hidden_LE = hidden_LE + _by_expert(layout, attended_LE, *outs)
        mlps = [_norm_and_mlp(expert, config) for expert in (layer.und, layer.gen)]
        hidden_LE = hidden_LE + _by_expert(layout, hidden_LE, *mlps)
    final = model.decoder.norm
    return _by_expert(layout, hidden_LE, _norm(final["und"], config), _norm(final["gen"], config))


def _by_expert(layout: Layout, tokens_LE: Tensor, und: PerToken, gen: PerToken) -> Tensor:
    """Each expert's function of its own tokens, gathered and scattered."""
    if layout.latent_index_L is None:
        return und(tokens_LE)
    out_LE = torch.zeros_like(tokens_LE)
    out_LE[layout.text_index_L] = und(tokens_LE[layout.text_index_L])
    out_LE[layout.latent_index_L] = gen(tokens_LE[layout.latent_index_L])
    return out_LE


def _project(layer: nn.Module, normed_LE: Tensor, layout: Layout, config: LLMConfig) -> list[Tensor]:
    """Query [L, H, D], key and value [L, K, D]; the first two normed per head."""
    if layout.latent_index_L is None:
        projections = as_linears(layer.und.qkv_proj)
        return [
            _norm_heads(layer.und, name, projections[f"{name}_proj"](normed_LE), config)
            for name in ("q", "k", "v")
        ]
    text_LE, latent_LE = normed_LE[layout.text_index_L], normed_LE[layout.latent_index_L]
    und, gen = (as_linears(expert.qkv_proj) for expert in (layer.und, layer.gen))
    heads = []
    for name in ("q", "k", "v"):
        out = normed_LE.new_zeros(len(normed_LE), layer.und.qkv_proj.sizes[f"{name}_proj"])
        out[layout.text_index_L], out[layout.latent_index_L] = (
            und[f"{name}_proj"](text_LE),
            gen[f"{name}_proj"](latent_LE),
        )
        heads.append(_norm_routed_heads(layer, name, out, layout, config))
    return heads


def _norm_routed_heads(
    layer: nn.Module, name: str, flat_LE: Tensor, layout: Layout, config: LLMConfig
) -> Tensor:
    """`_norm_heads` of both experts' tokens; queries and keys stay in float32, as in the reference."""
    if name == "v" or not config.qk_norm:
        return _norm_heads(layer.und, name, flat_LE, config)
    heads = flat_LE.unflatten(-1, (-1, config.head_dim)).float()
    for index_L, expert in ((layout.text_index_L, layer.und), (layout.latent_index_L, layer.gen)):
        heads[index_L] = _norm(getattr(expert, f"{name}_norm"), config)(heads[index_L])
    return heads


def _norm_heads(expert: nn.Module, name: str, flat_LE: Tensor, config: LLMConfig) -> Tensor:
    heads = flat_LE.unflatten(-1, (-1, config.head_dim))
    return (
        heads if name == "v" or not config.qk_norm else _norm(getattr(expert, f"{name}_norm"), config)(heads)
    )


def _merge(
    cache: Cache, layer: int, key_LKD: Tensor, value_LKD: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The context's and the new keys and values in two fresh buffers [C + L, K, D]."""
    if layer not in cache.keys:
        return key_LKD, value_LKD
    merged = []
    for past_CKD, new_LKD in ((cache.keys[layer], key_LKD), (cache.values[layer], value_LKD)):
        out_SKD = past_CKD.new_zeros(len(past_CKD) + len(new_LKD), *past_CKD.shape[1:])
        out_SKD[layout.query_index_L] = new_LKD
        out_SKD[layout.past_index_C] = past_CKD
        merged.append(out_SKD)
    return merged[0], merged[1]


def _attend(query_LHD: Tensor, key_SKD: Tensor, value_SKD: Tensor, layout: Layout) -> Tensor:
    """Grouped-query attention of one sequence, [L, H, D]."""
    batched = (tensor.transpose(0, 1)[None] for tensor in (query_LHD, key_SKD, value_SKD))
    out = F.scaled_dot_product_attention(*batched, attn_mask=layout.mask_LS, enable_gqa=True)
    return out[0].transpose(0, 1)


def _norm_and_mlp(expert: nn.Module, config: LLMConfig) -> PerToken:
    halves, down = as_linears(expert.gate_up_proj), as_linear(expert.down_proj)
    gate, up = halves["gate_proj"], halves["up_proj"]
    norm = _norm(expert.post_attention_norm, config)

    def run(hidden_LE: Tensor) -> Tensor:
        normed_LE = norm(hidden_LE)
        return down(F.silu(gate(normed_LE)) * up(normed_LE))

    return run


def as_linear(module: nn.Module) -> PerToken:
    """The plain product with a module's weights."""
    return lambda tokens_LE: F.linear(tokens_LE, module.weight, module.bias)


_PROJECTIONS: WeakKeyDictionary[FusedLinear, Mapping[str, nn.Module]] = WeakKeyDictionary()


def as_linears(module: FusedLinear) -> Mapping[str, PerToken]:
    """`as_linear` of each projection on its own."""
    return {name: as_linear(part) for name, part in cut_projections(module).items()}


def cut_projections(module: FusedLinear) -> Mapping[str, nn.Module]:
    """Each projection with `weight` and `bias` of its own, as the reference has them: cut out once, not in
    every forward; they lie where the model's do, and change with them.
    """
    if module not in _PROJECTIONS:
        parts = {}
        for name, own in module.rows().items():
            parts[name] = nn.Module()
            parts[name].weight = nn.Parameter(module.weight[own].detach(), requires_grad=False)
            parts[name].bias = None
            if module.bias is not None:
                parts[name].bias = nn.Parameter(module.bias[own].detach(), requires_grad=False)
        _PROJECTIONS[module] = parts
    return _PROJECTIONS[module]


def _norm(module: nn.Module, config: LLMConfig) -> PerToken:
    """RMS norm: in float32, back to the dtype of what comes in, then times the weight."""

    def run(hidden: Tensor) -> Tensor:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        return module.weight * normed.to(hidden.dtype)

    return run


def _build_rope(position_L: Tensor, config: LLMConfig, dtype: torch.dtype) -> PerToken:
    """Turns heads [L, H, D] to their positions: halves of a head are the two sides of each pair."""
    half = torch.arange(0, config.head_dim, 2, device=position_L.device).float() / config.head_dim
    angle_LD = torch.outer(position_L.float(), config.rope_theta**-half).repeat(1, 2)
    cos_L1D, sin_L1D = angle_LD.cos().to(dtype)[:, None], angle_LD.sin().to(dtype)[:, None]

    def turn(heads_LHD: Tensor) -> Tensor:
        first, second = heads_LHD.chunk(2, dim=-1)
        return heads_LHD * cos_L1D + torch.cat((-second, first), dim=-1) * sin_L1D

    return turn
