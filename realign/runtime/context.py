"""Reading: what blocks are made of, and what they add to contexts.

Reading adds one block at a time, to many contexts in one packed forward. A text block is bos + ids + eos at
running positions, causal. A picture is two blocks, the autoencoder's latents and then the ViT's features,
each between start_of_image and end_of_image, seeing itself whole, and all at one position.

N layers, L tokens, K key-value heads, D head dim, E model width, C latent channels.
Source: BAGEL, arXiv 2505.14683, `forward_cache_update_text`, `_vae`, `_vit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from realign.model.bagel import Bagel, patchify_latent, patchify_pixels
from realign.model.embeddings import flattened_position_ids
from realign.model.mot import Route
from realign.runtime.attention import Backend, ContextAttention
from realign.runtime.attention.gradient import DifferentiableAttention
from realign.runtime.kv import Context, Segment, check_current

MAX_ENCODE_PIXELS = 2**21
# Tokens of a text that are read at once: the mask of a forward is as large as this times the context.
MAX_TEXT_TOKENS = 512


@dataclass(frozen=True, eq=False)
class TextBlock:
    """A text turn, or a piece of a long one: its token ids, bos and eos included."""

    ids: tuple[int, ...]

    is_causal = True

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def num_positions(self) -> int:
        return len(self.ids)

    def embed(self, model: Bagel) -> Tensor:
        return model.embed_text(torch.tensor(self.ids, device=model.device))


@dataclass(frozen=True, eq=False)
class PictureBlock:
    """A picture's embedded tokens [L, E], without markers; `is_gen` for latents (generation expert)."""

    tokens_LE: Tensor
    is_gen: bool

    is_causal = False
    num_positions = 1

    @property
    def length(self) -> int:
        return len(self.tokens_LE) + 2

    def embed(self, model: Bagel) -> Tensor:
        start_1E, end_1E = embed_markers(model)
        return torch.cat((start_1E, self.tokens_LE, end_1E))


Block = TextBlock | PictureBlock


def embed_markers(model: Bagel) -> tuple[Tensor, Tensor]:
    """Embeddings [1, E] of start_of_image and end_of_image."""
    ids = (model.tokenizer.start_of_image, model.tokenizer.end_of_image)
    start_1E, end_1E = model.embed_text(torch.tensor(ids, device=model.device)).split(1)
    return start_1E, end_1E


def build_text_block(model: Bagel, text: str) -> TextBlock:
    return TextBlock((model.tokenizer.bos, *model.tokenizer.encode(text), model.tokenizer.eos))


def split_text_block(block: TextBlock, size: int = MAX_TEXT_TOKENS) -> list[TextBlock]:
    """Pieces of at most `size` tokens; read one after another they are what the whole is."""
    return [TextBlock(block.ids[start : start + size]) for start in range(0, block.length, size)]


@torch.no_grad()
def build_vae_blocks(model: Bagel, pictures_CHW: Sequence[Tensor]) -> list[PictureBlock]:
    """Pixels in [-1, 1], sides multiples of the latent stride, to blocks of clean latents (time 0)."""
    latents = encode_latents(model, pictures_CHW)
    time_1 = torch.zeros(1, device=model.device)
    blocks = []
    for latent_LC, pixels_CHW in zip(latents, pictures_CHW, strict=True):
        position_L = latent_position_ids(model, *pixels_CHW.shape[1:])
        blocks.append(
            PictureBlock(model.embed_latent(latent_LC, time_1, position_L).to(model.dtype), is_gen=True)
        )
    return blocks


@torch.no_grad()
def build_vit_blocks(model: Bagel, pictures_CHW: Sequence[Tensor]) -> list[PictureBlock]:
    """Pixels in [-1, 1], sides multiples of the ViT's patch, to blocks of features."""
    blocks: dict[int, PictureBlock] = {}
    for indexes in _batches_of_size(pictures_CHW, model.device):
        patch = model.config.vit.patch_size
        patches = [patchify_pixels(pictures_CHW[index].to(model.device), patch) for index in indexes]
        position = [vit_position_ids(model, *pictures_CHW[index].shape[1:]) for index in indexes]
        lengths = torch.tensor([0, *map(len, patches)], device=model.device)
        cu_seqlens = lengths.cumsum(0).to(torch.int32)
        tokens_LE = model.embed_vit(torch.cat(patches), torch.cat(position), cu_seqlens).to(model.dtype)
        for index, part_LE in zip(indexes, tokens_LE.split([*map(len, patches)]), strict=True):
            blocks[index] = PictureBlock(part_LE, is_gen=False)
    return [blocks[index] for index in range(len(pictures_CHW))]


@torch.no_grad()
def encode_latents(model: Bagel, pictures_CHW: Sequence[Tensor]) -> list[Tensor]:
    """Latent tokens [L, C] of pictures; those of one size in one call of the autoencoder."""
    latents: dict[int, Tensor] = {}
    for indexes in _batches_of_size(pictures_CHW, model.device):
        pixels_BCHW = torch.stack([pictures_CHW[index] for index in indexes]).to(model.device, model.dtype)
        pixels_BCHW = pixels_BCHW.contiguous(memory_format=torch.channels_last)  # faster convolutions
        for index, latent_CHW in zip(indexes, model.autoencoder.encode(pixels_BCHW), strict=True):
            latents[index] = patchify_latent(latent_CHW, model.config.latent_patch_size)
    return [latents[index] for index in range(len(pictures_CHW))]


def latent_position_ids(model: Bagel, height: int, width: int) -> Tensor:
    """Places of the latent tokens of a picture of `height` x `width` pixels."""
    config = model.config
    grid = (height // config.latent_stride, width // config.latent_stride)
    return flattened_position_ids(*grid, config.max_latent_size, config.interpolate_pos).to(model.device)


def vit_position_ids(model: Bagel, height: int, width: int) -> Tensor:
    """Places of the ViT patches of a picture of `height` x `width` pixels."""
    config = model.config
    grid = (height // config.vit.patch_size, width // config.vit.patch_size)
    limit = config.vit_max_num_patch_per_side
    return flattened_position_ids(*grid, limit, config.interpolate_pos).to(model.device)


def extend(
    model: Bagel,
    contexts: Sequence[Context],
    blocks: Sequence[Block],
    backend: Backend | None = None,
    has_gradient: bool = False,
) -> list[Context]:
    """Let each context read its block: one packed forward. Blocks of all kinds may be mixed.

    With `has_gradient`, and where torch has gradients enabled, keys and values have one to what the decoder
    computes them with; their bits are the same.
    """
    if not blocks:
        return []
    check_current(contexts, model)
    with torch.set_grad_enabled(has_gradient and torch.is_grad_enabled()):
        return _extend(model, contexts, blocks, backend)


def _extend(
    model: Bagel, contexts: Sequence[Context], blocks: Sequence[Block], backend: Backend | None
) -> list[Context]:
    lengths = [block.length for block in blocks]
    starts = [context.next_position for context in contexts]
    position_L = torch.cat(
        [
            start
            + (
                torch.arange(block.length)
                if block.is_causal
                else torch.zeros(block.length, dtype=torch.int64)
            )
            for start, block in zip(starts, blocks, strict=True)
        ]
    )
    route = Route.from_mask(torch.cat([_is_gen(block) for block in blocks]).to(model.device))
    hidden_LE = torch.cat([block.embed(model) for block in blocks])
    given = (model, contexts, lengths, [block.is_causal for block in blocks], backend)
    if torch.is_grad_enabled():
        recorder: _Recorder | _GradientRecorder = _GradientRecorder(DifferentiableAttention(*given), model)
    else:
        recorder = _Recorder(ContextAttention(*given), model, sum(lengths))
    model.decoder(hidden_LE, position_L.to(model.device), route, recorder)
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    segments = [recorder.segment(start, end) for start, end in pairwise(ends)]
    return [
        context.extended(segment, block.num_positions, model.weights_version)
        for context, segment, block in zip(contexts, segments, blocks, strict=True)
    ]


class _Recorder:
    """Passes attention on and keeps the new keys and values."""

    def __init__(self, attend: Callable[..., Tensor], model: Bagel, num_tokens: int) -> None:
        llm = model.config.llm
        shape = (llm.num_hidden_layers, num_tokens, llm.num_key_value_heads, llm.head_dim)
        self.key_NLKD, self.value_NLKD = (
            torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2)
        )
        self.attend = attend

    def __call__(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Tensor:
        self.key_NLKD[layer], self.value_NLKD[layer] = key_LKD, value_LKD
        return self.attend(layer, query_LHD, key_LKD, value_LKD)

    def segment(self, start: int, end: int) -> Segment:
        """Some of the tokens, in memory of their own: it goes when they go."""
        return Segment(self.key_NLKD[:, start:end].contiguous(), self.value_NLKD[:, start:end].contiguous())


class _GradientRecorder:
    """The same where keys and values have a gradient. A layer that is computed again in the backward pass
    changes nothing of what was kept."""

    def __init__(self, attend: Callable[..., Tensor], model: Bagel) -> None:
        self.attend, self.dtype = attend, model.dtype
        self.heads: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor) -> Tensor:
        self.heads.setdefault(layer, (key_LKD, value_LKD))
        return self.attend(layer, query_LHD, key_LKD, value_LKD)

    def segment(self, start: int, end: int) -> Segment:
        layers = zip(*self.heads.values(), strict=True)
        return Segment(*(torch.stack([t[start:end].to(self.dtype) for t in one]) for one in layers))


def _is_gen(block: Block) -> Tensor:
    """Per token; a picture's markers are read by the understanding expert."""
    mask_L = torch.zeros(block.length, dtype=torch.bool)
    if isinstance(block, PictureBlock) and block.is_gen:
        mask_L[1:-1] = True
    return mask_L


def num_pictures_at_once(device: torch.device, height: int, width: int) -> int:
    """Pictures in a call of autoencoder or ViT. On a CPU one: that is faster there, and the last bits of
    a convolution depend on the size of its batch."""
    return 1 if device.type == "cpu" else max(1, MAX_ENCODE_PIXELS // (height * width))


def _batches_of_size(pictures_CHW: Sequence[Tensor], device: torch.device) -> Iterable[list[int]]:
    """Indexes of pictures of one size, as many as are encoded at once."""
    by_size: dict[torch.Size, list[int]] = {}
    for index, pixels_CHW in enumerate(pictures_CHW):
        by_size.setdefault(pixels_CHW.shape, []).append(index)
    for (_, height, width), indexes in by_size.items():
        count = num_pictures_at_once(device, height, width)
        yield from (indexes[start : start + count] for start in range(0, len(indexes), count))
