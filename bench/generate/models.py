"""The models that are measured: mini, and BAGEL-7B's real configuration with random weights made in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from realign.model.bagel import Bagel
from realign.model.config import BagelConfig, LLMConfig, ViTConfig
from realign.model.embeddings import PositionEmbedding, build_sincos_table

MODELS = ("mini", "bagel-7b")

# BAGEL-7B-MoT's published `llm_config.json` and `vit_config.json`; all else is `BagelConfig`'s default.
BAGEL_7B = BagelConfig(
    llm=LLMConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_theta=1e6,
    ),
    vit=ViTConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        patch_size=14,
        image_size=980,
    ),
    name="bagel-7b, random weights",
)


class RandomTokenizer:
    """A tokenizer for a model whose weights are random: a text's characters are its ids, and back.

    So what such a model writes reads back to the same tokens, and texts have the lengths that are wanted.
    """

    FIRST = 0x20000  # code points from here on stand for the ids; those below are their own ids

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.bos, self.eos, self.start_of_image, self.end_of_image = range(vocab_size - 4, vocab_size)

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """An id for each character."""
        points = map(ord, text)
        return [(point - self.FIRST if point >= self.FIRST else point) % self.vocab_size for point in points]

    def decode(self, ids: Sequence[int]) -> str:
        """A character for each id."""
        return "".join(chr(self.FIRST + number) for number in ids)


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> Bagel:
    """One of `MODELS`. Raises: ValueError for another name."""
    if name == "mini":
        return Bagel.from_pretrained("mini", device=device, dtype=dtype)
    if name == "bagel-7b":
        return build_random(BAGEL_7B, device, dtype)
    raise ValueError(f"model is {name!r}: must be one of {', '.join(MODELS)}")


def build_random(config: BagelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Bagel:
    """A model with random weights, held once: norms 1, biases 0, all else normal; both experts differ."""
    with torch.device("meta"):
        model = Bagel(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(std=config.llm.initializer_range, generator=generator)
    for module in model.modules():
        if isinstance(module, PositionEmbedding):
            rows, width = module.pos_embed.shape
            module.pos_embed.copy_(build_sincos_table(round(rows**0.5), width))
    model.tokenizer = RandomTokenizer(config.llm.vocab_size)
    return model
