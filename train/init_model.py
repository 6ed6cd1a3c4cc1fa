"""Makes mini's untrained checkpoint folder: configuration, tokenizer, the trained autoencoder, random
weights.

python -m train.init_model --autoencoder runs/ae --out runs/start
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from realign.model.bagel import Bagel
from realign.model.config import AutoencoderConfig, BagelConfig, LLMConfig, ResizeRule, ViTConfig
from realign.model.tokenizer import Tokenizer
from realign.world.render import REFERENCE_SIZE, SIZE
from train.tokenizer import train_tokenizer


def mini_config(vocab_size: int, autoencoder: AutoencoderConfig) -> BagelConfig:
    """BAGEL's architecture at a size that two CPU cores train in an hour."""
    return BagelConfig(
        llm=LLMConfig(
            vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=5,
            num_attention_heads=4, num_key_value_heads=2, rope_theta=10000.0, initializer_range=0.05,
        ),
        vit=ViTConfig(
            hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            patch_size=8, image_size=SIZE,
        ),
        autoencoder=autoencoder,
        latent_patch_size=2,
        max_latent_size=4,
        vit_max_num_patch_per_side=8,
        vae_resize=ResizeRule(SIZE, REFERENCE_SIZE, 16),
        vit_resize=ResizeRule(SIZE, REFERENCE_SIZE, 8),
        default_image_size=(SIZE, SIZE),
        size_follows_picture=False,
        reasoning_modes=("none", "ic-cot"),
        name="mini",
    )  # fmt: skip


def init_model(autoencoder: Path, out: Path, seed: int) -> Bagel:
    """Writes the folder and returns the model."""
    train_tokenizer(out, num=3000)
    tokenizer = Tokenizer.load(out)
    values = json.loads((autoencoder / "ae_config.json").read_text())
    values["ch_mult"] = tuple(values["ch_mult"])
    torch.manual_seed(seed)
    model = Bagel(mini_config(len(tokenizer), AutoencoderConfig(**values)))
    model.autoencoder.load_state_dict(load_file(autoencoder / "ae.safetensors"))
    model.tokenizer = tokenizer
    model.save_pretrained(out)
    return model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = init_model(args.autoencoder, args.out, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(model.tokenizer)} tokens")


if __name__ == "__main__":
    main()
