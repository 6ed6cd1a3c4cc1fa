"""Inputs for the tests of attention ops, and an independent definition of attention.

R rows, H query heads, K key-value heads, S tokens of a slot, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.devices import device_of

LARGEST_SCORE = 8.0  # of those drawn, about: a weight is off by as much as its score is, relatively


@dataclass(frozen=True)
class DecodeCase:
    """One call of `decode_attention`. Numbers are exact in bfloat16, so that casts lose nothing."""

    query_RHD: Tensor
    key_RKSD: Tensor
    value_RKSD: Tensor
    length_R: Tensor

    @classmethod
    def draw(
        cls, lengths: list[int], heads: tuple[int, int], dim: int, spare: int = 3, seed: int = 0
    ) -> DecodeCase:
        """Slots of the longest length and `spare` tokens; what lies behind a row's length is NaN."""
        generator = torch.Generator().manual_seed(seed)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16().float()

        num_rows, (num_heads, key_heads) = len(lengths), heads
        num_tokens = max(lengths, default=0) + spare
        slots = [numbers(num_rows, key_heads, num_tokens, dim) for _ in range(2)]
        for row, length in enumerate(lengths):
            for slot in slots:
                slot[row, :, length:] = float("nan")
        return cls(2 * numbers(num_rows, num_heads, dim), *slots, torch.tensor(lengths, dtype=torch.int64))

    def to(self, dtype: torch.dtype) -> DecodeCase:
        names = ("query_RHD", "key_RKSD", "value_RKSD")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def on(self, impl: str) -> DecodeCase:
        return DecodeCase(**{name: tensor.to(device_of(impl)) for name, tensor in vars(self).items()})

    def take(self, row: int) -> DecodeCase:
        """The row alone, in memory of its own, in a slot that it fills."""
        length = int(self.length_R[row])
        slots = [slot[row : row + 1, :, :length].clone() for slot in (self.key_RKSD, self.value_RKSD)]
        return DecodeCase(self.query_RHD[row : row + 1].clone(), *slots, self.length_R[row : row + 1].clone())

    def plain(self) -> tuple[Tensor, Tensor]:
        """Row after row by torch's own attention, in the dtype; log-sum-exps by its own products."""
        outs, lses = [], []
        for query_HD, key_KSD, value_KSD, length in zip(*vars(self).values(), strict=True):
            if length == 0:
                outs.append(torch.zeros_like(query_HD))
                lses.append(torch.full(query_HD.shape[:1], -math.inf, dtype=query_HD.dtype))
                continue
            num_groups = len(query_HD) // len(key_KSD)
            key_HSD, value_HSD = (
                slot[:, :length].repeat_interleave(num_groups, 0) for slot in (key_KSD, value_KSD)
            )
            query_H1D = query_HD[:, None]
            outs.append(F.scaled_dot_product_attention(query_H1D, key_HSD, value_HSD)[:, 0])
            score_H1S = query_H1D @ key_HSD.mT * query_HD.shape[1] ** -0.5
            lses.append(score_H1S.logsumexp(-1)[:, 0])
        if not outs:
            return torch.empty_like(self.query_RHD), torch.empty_like(self.query_RHD[..., 0])
        return torch.stack(outs), torch.stack(lses)


def assert_lse_is_exact(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Infinities where they are, else within twice plain float32's error or a few units in the last place."""
    actual, plain = actual.cpu(), plain.cpu()
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    is_finite = exact.isfinite()
    assert torch.equal(actual[~is_finite].double(), exact[~is_finite])
    if is_finite.any():
        error, plain_error = (
            (lse[is_finite].double() - exact[is_finite]).abs().max() for lse in (actual, plain)
        )
        least = 8 * torch.finfo(torch.float32).eps * max(1.0, exact[is_finite].abs().max())
        assert error <= max(2 * plain_error, least)
