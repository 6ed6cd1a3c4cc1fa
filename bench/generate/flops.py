"""Floating-point operations that the work needs, from the configuration: what a perfect runtime would do.

What requests have in common is counted once, and only the branches that act at a step. A product of [M, K]
and [K, N] is 2 M K N; softmax, norms and other work per element are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.generate.baseline import Made, list_steps
from realign.model.autoencoder import Autoencoder
from realign.model.bagel import Bagel
from realign.model.config import AutoencoderConfig, BagelConfig, LLMConfig, ViTConfig
from realign.reasoning.programs import PROGRAMS
from realign.runtime.prepare import fit_picture
from realign.runtime.request import ImagePart, Part, Request, TextPart, TextTurn


def count_requests(model: Bagel, requests: Sequence[Request], made: Sequence[Made | None]) -> dict[str, int]:
    """By phase; `made` says what text was written for each, and the size of its picture.

    None stands for a picture of the model's own size without a text.
    """
    work = Work(model)
    for request, one in zip(requests, made, strict=True):
        if one is None:
            work.add(request, None, *model.config.default_image_size)
        else:
            work.add(request, one.turn, one.image.height, one.image.width)
    return work.flops


def count_decoder(llm: LLMConfig, num_tokens: int, num_past: int, is_causal: bool = False) -> int:
    """A forward of new tokens after `num_past` others."""
    seen = num_tokens * num_past
    seen += num_tokens * (num_tokens + 1) // 2 if is_causal else num_tokens**2
    attention = 4 * llm.num_hidden_layers * seen * llm.num_attention_heads * llm.head_dim
    return count_products(llm, num_tokens) + attention


def count_products(llm: LLMConfig, num_tokens: int) -> int:
    """Of such a forward the products with weights."""
    width, heads = llm.hidden_size, llm.num_attention_heads * llm.head_dim
    kv_heads = llm.num_key_value_heads * llm.head_dim
    weights = 2 * width * (heads + kv_heads) + 3 * width * llm.intermediate_size
    return 2 * llm.num_hidden_layers * num_tokens * weights


def count_vit(vit: ViTConfig, width_out: int, num_patches: int) -> int:
    """The ViT and its connector on one picture."""
    width = vit.hidden_size
    linear = num_patches * (4 * width**2 + 2 * width * vit.intermediate_size)
    layers = vit.num_hidden_layers * (2 * linear + 4 * num_patches**2 * width)
    ends = vit.patch_dim * width + width * width_out + width_out**2
    return layers + 2 * num_patches * ends


@lru_cache
def count_autoencoder(config: AutoencoderConfig, height: int, width: int, is_decode: bool) -> int:
    """The autoencoder on one picture of these pixels."""
    counter = FlopCounterMode(display=False)  # of attention it knows the products of the plain form alone
    with torch.device("meta"), counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        autoencoder = Autoencoder(config)
        if is_decode:
            small = (height // config.downsample, width // config.downsample)
            autoencoder.decode(torch.empty(1, config.z_channels, *small))
        else:
            autoencoder.encode(torch.empty(1, config.in_channels, height, width))
    return counter.get_total_flops()


@dataclass
class Work:
    """Counts the work of requests, by phase.

    Attributes:
        flops: by phase.
        lengths: tokens of what was read already, by what was read.
    """

    model: Bagel
    flops: dict[str, int] = field(default_factory=dict)
    lengths: dict[tuple, int] = field(default_factory=dict)

    @property
    def config(self) -> BagelConfig:
        """The model's."""
        return self.model.config

    def add(
        self, request: Request, turn: TextTurn | None, height: int, width: int
    ) -> list[tuple[int, list[int]]]:
        """A request, with the text that was written for it, and the size of its picture.

        Returns: of each denoising step the new tokens of a branch, and what each that acts has read.
        """
        wanted = PROGRAMS[request.settings.reasoning].read_by_branch(request)
        lengths = {name: self._read(parts) for name, parts in wanted.items()}
        if turn is not None:
            lengths["conditional"] = self._write(lengths["conditional"], turn)
        tokens = height // self.config.latent_stride * (width // self.config.latent_stride)
        steps = [
            (tokens + 2, [own for name, own in lengths.items() if name == "conditional" or is_guided])
            for _, _, is_guided in list_steps(request.settings)
        ]
        for step in steps:
            self._count("denoising", self.count_step(*step))
        decode = count_autoencoder(self.config.autoencoder, height, width, True)
        self._count("autoencoder", decode)
        return steps

    def count_step(self, num_tokens: int, lengths: Sequence[int]) -> int:
        """A forward of so many tokens after each of the contexts."""
        return sum(count_decoder(self.config.llm, num_tokens, length) for length in lengths)

    def _count(self, phase: str, flops: int) -> None:
        self.flops[phase] = self.flops.get(phase, 0) + flops

    def _read(self, parts: Sequence[Part]) -> int:
        """Reads parts, those beginnings apart that were read before; the tokens of all."""
        name, length = (), 0
        for part in parts:
            name = (*name, part.text if isinstance(part, TextPart) else id(part.image))
            if name not in self.lengths:
                self.lengths[name] = self._read_part(part, length)
            length = self.lengths[name]
        return length

    def _read_part(self, part: Part, length: int) -> int:
        llm = self.config.llm
        if isinstance(part, TextPart):
            count = len(self.model.tokenizer.encode(part.text)) + 2
            self._count("reading", count_decoder(llm, count, length, is_causal=True))
            return length + count
        return self._read_picture(part, length)

    def _read_picture(self, part: ImagePart, length: int) -> int:
        config, picture = self.config, fit_picture(part.image, self.config)
        size = (picture.height, picture.width)
        self._count("autoencoder", count_autoencoder(config.autoencoder, *size, False))
        patches = picture.vit_CHW[0].numel() // config.vit.patch_size**2
        self._count("reading", count_vit(config.vit, config.llm.hidden_size, patches))
        for count in (picture.vae_CHW[0].numel() // config.latent_stride**2, patches):
            self._count("reading", count_decoder(config.llm, count + 2, length))
            length += count + 2
        return length

    def _write(self, length: int, turn: TextTurn) -> int:
        """The text's tokens one by one; the context then holds them, with what ends the turn."""
        llm = self.config.llm
        for number in range(len(turn.ids) + turn.stopped):
            self._count("reasoning", count_decoder(llm, 1, length + number))
            self._count("reasoning", 2 * llm.hidden_size * llm.vocab_size)
        return length + len(turn.ids) + 2
