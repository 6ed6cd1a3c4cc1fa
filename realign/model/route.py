"""Which tokens go to which expert, and how they get there from packed order and back. `L` tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

EXPERTS = ("und", "gen")  # understanding, generation


class Route:
    """Which packed tokens go to which expert.

    Attributes:
        experts: the names of those that have tokens, in their order; `sizes` how many each has.
        packed_index_L: int64, where each token in the order of the experts lies packed; `inverse_L` is the
            reverse. None where one expert has all tokens, and nothing is moved.
        expert_L: int32, the number of each token's expert, in the order of the experts; None likewise.
    """

    def __init__(self, und_index_L: torch.Tensor, gen_index_L: torch.Tensor) -> None:
        """Together the two indexes name each of 0..L-1 once; either may be empty."""
        self.und_index_L, self.gen_index_L = und_index_L, gen_index_L
        present = [number for number, index_L in enumerate((und_index_L, gen_index_L)) if len(index_L)]
        self.experts = tuple(EXPERTS[number] for number in present)
        self.sizes = [len((und_index_L, gen_index_L)[number]) for number in present]
        self.length = sum(self.sizes)
        self.packed_index_L = self.inverse_L = self.expert_L = None
        if len(present) > 1:
            self.packed_index_L = torch.cat([und_index_L, gen_index_L])
            self.inverse_L = torch.argsort(self.packed_index_L)
            self.expert_L = torch.ones_like(self.packed_index_L, dtype=torch.int32)
            self.expert_L[: len(und_index_L)] = 0

    @classmethod
    def from_mask(cls, is_gen_L: torch.Tensor) -> Route:
        """From a boolean per token: true goes to the generation expert."""
        return cls(torch.nonzero(~is_gen_L)[:, 0], torch.nonzero(is_gen_L)[:, 0])

    def split(self, tokens_L: torch.Tensor) -> Sequence[torch.Tensor]:
        """The part of each expert that has tokens: views."""
        return (tokens_L,) if len(self.experts) == 1 else tokens_L.split(self.sizes)

    def unpack(self, packed_L: torch.Tensor) -> torch.Tensor:
        """Packed tokens [L, ...] to the order of the experts."""
        return self._permute(packed_L, self.packed_index_L, self.inverse_L)

    def pack(self, tokens_L: torch.Tensor) -> torch.Tensor:
        """The reverse of `unpack`."""
        return self._permute(tokens_L, self.inverse_L, self.packed_index_L)

    @staticmethod
    def _permute(
        tokens_L: torch.Tensor, index_L: torch.Tensor | None, inverse_L: torch.Tensor | None
    ) -> torch.Tensor:
        return tokens_L if index_L is None else _Permute.apply(tokens_L, index_L, inverse_L)


class _Permute(torch.autograd.Function):
    """Its gradient is the reverse permutation: no scatter-add, which is what autograd would do."""

    @staticmethod
    def forward(
        ctx: Any, tokens_L: torch.Tensor, index_L: torch.Tensor, inverse_L: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(index_L, inverse_L)
        return tokens_L.index_select(0, index_L)

    @staticmethod
    def backward(ctx: Any, grad_L: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        index_L, inverse_L = ctx.saved_tensors
        return _Permute.apply(grad_L, inverse_L, index_L), None, None
