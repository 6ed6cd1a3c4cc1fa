"""What a replay computes, written out: one sequence, one forward, a mask; no cache and no kernel of ours.

L tokens of the sequence, H query heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from realign.model.bagel import Bagel
from realign.model.mot import Route
from realign.runtime.context import (
    Block,
    PictureBlock,
    build_text_block,
    build_vae_blocks,
    build_vit_blocks,
)
from realign.runtime.prepare import crop_picture
from realign.runtime.request import Part, TextPart


def build_blocks(model: Bagel, parts: Sequence[Part]) -> list[Block]:
    """A prompt's blocks; pictures are cropped."""
    blocks: list[Block] = []
    for part in parts:
        if isinstance(part, TextPart):
            blocks.append(build_text_block(model, part.text))
        else:
            prepared = crop_picture(part.image, model.config)
            blocks += build_vae_blocks(model, [prepared.vae_CHW])
            blocks += build_vit_blocks(model, [prepared.vit_CHW])
    return blocks


def forward_plainly(model: Bagel, blocks: Sequence[Block]) -> list[Tensor]:
    """Final hidden states of each block: each sees those before it whole, and itself, a text causally."""
    positions, is_gen, starts, position = [], [], [], 0
    for block in blocks:
        starts.append(len(is_gen))
        places = range(block.length) if block.is_causal else [0] * block.length
        positions += [position + place for place in places]
        position += block.num_positions
        is_latent = isinstance(block, PictureBlock) and block.is_gen
        is_gen += [is_latent and 0 < i < block.length - 1 for i in range(block.length)]
    mask_LL = torch.ones(len(is_gen), len(is_gen), dtype=torch.bool).tril()
    for block, start in zip(blocks, starts, strict=True):
        end = start + block.length
        mask_LL[start:end, start:end] |= not block.is_causal
    embedded_LE = torch.cat([block.embed(model) for block in blocks])
    route = Route.from_mask(torch.tensor(is_gen))
    attend = partial(_attend, mask_LL)
    hidden_LE = model.decoder(embedded_LE, torch.tensor(positions), route, attend)
    return list(hidden_LE.split([block.length for block in blocks]))


def _attend(mask_LL: Tensor, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Tensor:
    groups = query_LHD.shape[1] // key_LKD.shape[1]
    key_LHD, value_LHD = (t.repeat_interleave(groups, dim=1) for t in (key_LKD, value_LKD))
    score_HLL = torch.einsum("qhd,shd->hqs", query_LHD, key_LHD) / query_LHD.shape[-1] ** 0.5
    weight_HLL = score_HLL.masked_fill(~mask_LL, -torch.inf).softmax(-1)
    return torch.einsum("hqs,shd->qhd", weight_HLL, value_LHD)
