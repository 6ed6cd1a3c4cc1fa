"""Low-rank adapters (LoRA, arXiv 2106.09685) of projections that are fused, merged in the forward pass.

`W = base + scale * up @ down` lies in the model, as the engine runs it; a linear layer computes `x W^T`,
and its backward gives, with dY the gradient of the projection's outputs,

    d up = scale * dY^T (x down^T),   d down = scale * (dY up)^T x,   d x = dY W

without the gradient of W. (peft wraps a whole linear in base and adapter, two products whose sum is not bit
for bit the merged one's, and knows no rows of a fused weight; so this is our own.)

L rows, I inputs, O outputs of a projection, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from realign.model.bagel import Bagel
from realign.model.linear import FusedLinear, RowLinear, linear_by_rows
from realign.model.route import EXPERTS


@dataclass(frozen=True, eq=False)
class Adapter:
    """One projection's: `down_RI` begins random, `up_OR` zero, so that nothing is changed yet."""

    down_RI: nn.Parameter
    up_OR: nn.Parameter


Place = tuple[slice, str]  # rows of a weight, and the name of the projection that has them


def list_projections(model: Bagel, experts: Sequence[str] = ("gen",)) -> dict[RowLinear, list[Place]]:
    """The linear layers of experts, one expert after the other, and the projections in each."""
    found: dict[RowLinear, list[Place]] = {}
    for expert, (number, layer) in product(experts, enumerate(model.decoder.layers)):
        for name, module in getattr(layer, expert).named_children():
            prefix = f"decoder.layers.{number}.{expert}"
            if isinstance(module, FusedLinear):
                found[module] = [(rows, f"{prefix}.{own}") for own, rows in module.rows().items()]
            elif isinstance(module, RowLinear):
                found[module] = [(slice(None), f"{prefix}.{name}")]
    return found


def draw_adapters(
    model: Bagel, rank: int, seed: int, experts: Sequence[str] = ("gen",)
) -> dict[str, Adapter]:
    """An adapter of each projection, named as `Publisher` names them; `down` uniform in +-1 / sqrt(I)."""
    adapters = {}
    generator = torch.Generator().manual_seed(seed)
    for linear, places in list_projections(model, experts).items():
        for rows, name in places:
            outputs, inputs = linear.weight[rows].shape
            down_RI = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5
            up_OR = torch.zeros(outputs, rank)
            adapters[name] = Adapter(*(nn.Parameter(t.to(model.device)) for t in (down_RI, up_OR)))
    return adapters


@contextmanager
def attach_adapters(model: Bagel, adapters: Mapping[str, Adapter], scale: float) -> Iterator[None]:
    """While gradients of the model's projections go to the adapters."""
    changed = []
    for linear, places in list_projections(model, EXPERTS).items():
        own = [(rows, adapters[name]) for rows, name in places if name in adapters]
        if own:
            linear.forward = partial(_project, linear, own, scale)
            changed.append(linear)
    try:
        yield
    finally:
        for linear in changed:
            del linear.forward


def _project(
    linear: RowLinear, adapters: Sequence[tuple[slice, Adapter]], scale: float, x_LI: Tensor
) -> Tensor:
    factors = [factor for _, adapter in adapters for factor in (adapter.down_RI, adapter.up_OR)]
    places = [rows for rows, _ in adapters]
    return _MergedLinear.apply(x_LI, linear.weight, linear.bias, places, scale, *factors)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_LI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        places: Sequence[slice],
        scale: float,
        *factors: Tensor,
    ) -> Tensor:
        ctx.places, ctx.scale = places, scale
        ctx.save_for_backward(x_LI, weight_OI, *factors)
        return linear_by_rows(x_LI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, grad_LO: Tensor) -> tuple[Tensor | None, ...]:
        x_LI, weight_OI, *factors = ctx.saved_tensors
        grad_x_LI = grad_LO @ weight_OI if ctx.needs_input_grad[0] else None
        grads = []
        for rows, down_RI, up_OR in zip(ctx.places, factors[::2], factors[1::2], strict=True):
            own_LO, down_RI, up_OR = grad_LO[:, rows], down_RI.to(x_LI.dtype), up_OR.to(x_LI.dtype)
            grad_up_OR = own_LO.T @ (x_LI @ down_RI.T)
            grad_down_RI = (own_LO @ up_OR).T @ x_LI
            grads += [ctx.scale * grad_down_RI.float(), ctx.scale * grad_up_OR.float()]
        return grad_x_LI, None, None, None, None, *grads
