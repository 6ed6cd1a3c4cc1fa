"""The packed training forward: text, ViT, clean-latent and noised-latent tokens of many samples in one
sequence.

L packed tokens, T text tokens, P patch numbers, C latent channels of a token, M tokens with a flow loss,
N tokens with a text loss, B samples of a bucket, W its padded length, H heads, K key-value heads, D head dim.

Attention follows BAGEL (2505.14683, section 2.2; `create_sparse_mask` of its code): text is causal, a picture
sees itself whole, and a picture that is being noised is seen by nothing but itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from realign.model.bagel import Bagel
from realign.model.mot import Route

MODES = ("causal", "full", "noise")
Split = tuple[Sequence[int], Sequence[str]]  # of one sample: the length and the mode of each part
WIDTH_MULTIPLE = 16  # of a bucket: kernels that are prepared for each shape then meet few shapes


@dataclass
class PackedBatch:
    """Packed samples. Indexes point into the packed sequence of L tokens.

    Attributes:
        splits: for every sample the lengths and modes of its parts.
        position_ids: [L] rope positions.
        text_ids, text_index: [T].
        vit_patches, vit_position, vit_cu_seqlens, vit_index: [V, P], [V], [pictures + 1], [V].
        latent, latent_position, latent_index: clean latents [G, C], [G], [G].
        timestep: [G], 1 is noise; 0 marks a clean (context) latent.
        noise: [G, C].
        ce_index, labels: [N] tokens with a text loss and what follows them.
        mse_index: [M] noised tokens, in order; they are the latents with timestep > 0.
    """

    splits: Sequence[Split]
    position_ids: Tensor
    text_ids: Tensor
    text_index: Tensor
    vit_patches: Tensor
    vit_position: Tensor
    vit_cu_seqlens: Tensor
    vit_index: Tensor
    latent: Tensor
    latent_position: Tensor
    latent_index: Tensor
    timestep: Tensor
    noise: Tensor
    ce_index: Tensor
    labels: Tensor
    mse_index: Tensor

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on a device."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "splits"}
        return PackedBatch(splits=self.splits, **tensors)


@dataclass
class PackedLosses:
    """`ce` [N] per text token with a loss, `mse` [M, C] squared velocity error per latent number."""

    ce: Tensor
    mse: Tensor


def packed_losses(model: Bagel, batch: PackedBatch) -> PackedLosses:
    """Cross-entropy of next text tokens, and (v - (noise - latent))^2 at x_t = (1-t) latent + t noise."""
    time_G1 = batch.timestep[:, None]
    noised_GC = (1 - time_G1) * batch.latent + time_G1 * batch.noise
    text_TE = model.embed_text(batch.text_ids)
    gen_GE = model.embed_latent(noised_GC, batch.timestep, batch.latent_position).to(text_TE.dtype)
    parts, indexes = [text_TE], [batch.text_index]
    if len(batch.vit_index):
        vit_VE = model.embed_vit(batch.vit_patches, batch.vit_position, batch.vit_cu_seqlens)
        parts, indexes = [text_TE, vit_VE.to(text_TE.dtype)], [batch.text_index, batch.vit_index]
    und_index = torch.cat(indexes)
    hidden_LE = text_TE.new_zeros(len(batch.position_ids), text_TE.shape[-1])
    hidden_LE = hidden_LE.index_copy(0, und_index, torch.cat(parts)).index_copy(0, batch.latent_index, gen_GE)
    attend = BucketedAttention(batch.splits, hidden_LE.device)
    hidden_LE = model.decoder(hidden_LE, batch.position_ids, Route(und_index, batch.latent_index), attend)
    logits_NV = model.logits(hidden_LE[batch.ce_index])
    ce_N = F.cross_entropy(logits_NV.float(), batch.labels, reduction="none")
    velocity_MC = model.velocity(hidden_LE[batch.mse_index])
    target_MC = (batch.noise - batch.latent)[batch.timestep > 0]
    return PackedLosses(ce_N, (velocity_MC.float() - target_MC) ** 2)


class BucketedAttention:
    """`attend` of the training forward: samples of like length are padded together and attended to under
    BAGEL's mask.

    Written out as softmax(q k^T + mask) v: on a CPU its backward is twice as fast as the fused op's at these
    lengths, and padding to buckets (each at most `SLACK` longer than its shortest sample) wastes little.
    """

    SLACK = 1.35

    def __init__(self, splits: Sequence[Split], device: torch.device) -> None:
        lengths = [sum(lens) for lens, _ in splits]
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        order = sorted((i for i in range(len(lengths)) if lengths[i]), key=lengths.__getitem__)
        groups: list[list[int]] = []
        for i in order:
            if groups and lengths[i] <= self.SLACK * lengths[groups[-1][0]]:
                groups[-1].append(i)
            else:
                groups.append([i])
        self.buckets = [
            _Bucket([splits[i] for i in group], [starts[i] for i in group], device) for group in groups
        ]
        self.restore_L = torch.cat([b.packed_index for b in self.buckets]).argsort()

    def __call__(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Tensor:
        parts = [bucket.attend(query_LHD, key_LKD, value_LKD) for bucket in self.buckets]
        return torch.cat(parts).index_select(0, self.restore_L)


class _Bucket:
    """Samples that are padded together: where their tokens lie, packed and padded, and who sees whom."""

    def __init__(self, splits: Sequence[Split], starts: list[int], device: torch.device) -> None:
        lengths = torch.tensor([sum(lens) for lens, _ in splits])
        width = -(-int(lengths.max()) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.shape = (len(splits), width)
        column_W = torch.arange(width)
        valid_BW = column_W < lengths[:, None]
        index_BW = torch.tensor(starts)[:, None] + column_W.clamp(max=width - 1)
        index_BW = torch.where(valid_BW, index_BW, torch.tensor(starts)[:, None])
        self.padded_index = index_BW.flatten().to(device)
        self.packed_index = index_BW[valid_BW].to(device)
        self.valid = valid_BW.flatten().nonzero().flatten().to(device)
        allowed_BWW = _allowed(splits, width) & valid_BW[:, None, :]
        allowed_BWW |= torch.eye(width, dtype=torch.bool)  # padding rows attend to themselves: no NaN
        self.mask_B11WW = (
            torch.zeros(allowed_BWW.shape).masked_fill_(~allowed_BWW, float("-inf"))[:, None, None].to(device)
        )

    def attend(self, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Tensor:
        batch, width = self.shape
        heads, dim = query_LHD.shape[1:]
        kv_heads = key_LKD.shape[1]
        groups = heads // kv_heads

        def padded(tensor: Tensor) -> Tensor:
            taken = tensor.to(value_LKD.dtype).index_select(0, self.padded_index)
            return taken.view(batch, width, tensor.shape[1], dim).transpose(1, 2)

        # Autocast would make the softmax, the widest part, float32.
        with torch.autocast(value_LKD.device.type, enabled=False):
            query = padded(query_LHD * dim**-0.5).reshape(batch, kv_heads, groups * width, dim)
            key, value = padded(key_LKD), padded(value_LKD)
            scores = (query @ key.transpose(-1, -2)).view(batch, kv_heads, groups, width, width)
            weights = (scores + self.mask_B11WW.to(scores.dtype)).softmax(-1)
            mixed = weights.view(batch, kv_heads, groups * width, width) @ value
        mixed = mixed.view(batch, heads, width, dim).transpose(1, 2).reshape(batch * width, heads, dim)
        return mixed.index_select(0, self.valid)


def _allowed(splits: Sequence[Split], width: int) -> Tensor:
    """Who sees whom. Returns: bool [B, W, W], rows are queries."""
    part_BW = torch.full((len(splits), width), -1)
    mode_BW = torch.zeros(len(splits), width, dtype=torch.long)
    for row, (lens, modes) in enumerate(splits):
        sizes = torch.tensor(list(lens))
        part_BW[row, : int(sizes.sum())] = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        kinds = torch.tensor([MODES.index(m) for m in modes])
        mode_BW[row, : int(sizes.sum())] = torch.repeat_interleave(kinds, sizes)
    same_BWW = part_BW[:, :, None] == part_BW[:, None, :]
    causal_WW = torch.ones(width, width, dtype=torch.bool).tril()
    whole_B1W = (mode_BW != MODES.index("causal"))[:, None, :]
    noised_B1W = (mode_BW == MODES.index("noise"))[:, None, :]
    return (causal_WW | (same_BWW & whole_B1W)) & ~(noised_B1W & ~same_BWW)
