"""BAGEL: text, ViT and latent tokens in one decoder; logits and flow velocities out of it.

Shapes: `L` packed tokens, `E` width, `P` numbers in a ViT patch, `C` numbers in a latent token (in `CHW`:
channels), `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from realign.model import weights
from realign.model.autoencoder import Autoencoder
from realign.model.config import BagelConfig
from realign.model.embeddings import Connector, PositionEmbedding, TimestepEmbedder
from realign.model.linear import RowLinear, linear_by_rows
from realign.model.mot import MixtureOfTransformers
from realign.model.tokenizer import Tokenizer
from realign.model.vit import VisionTransformer


class Bagel(nn.Module):
    """The unified model (arXiv 2505.14683; ByteDance-Seed/Bagel), with its autoencoder and tokenizer.

    `Bagel(config)` is initialised for training from scratch, and has no tokenizer until one is set;
    `Bagel.from_pretrained(folder)` has both.

    Attributes:
        weights_version: how often the weights were changed in place (`announce_weights`).
        on_weights_changed: called with the names of the parameters that were; for what is derived from them.
    """

    def __init__(self, config: BagelConfig) -> None:
        super().__init__()
        width = config.llm.hidden_size
        self.config = config
        self.tokenizer: Tokenizer | None = None
        self.weights_version = 0
        self.on_weights_changed: list[Callable[[Collection[str]], None]] = []
        self.embed_tokens = nn.Embedding(config.llm.vocab_size, width)
        self.decoder = MixtureOfTransformers(config.llm)
        self.lm_head = None
        if not config.llm.tie_word_embeddings:
            self.lm_head = nn.Linear(width, config.llm.vocab_size, bias=False)
        self.vit = VisionTransformer(config.vit)
        self.connector = Connector(config.vit.hidden_size, width, config.connector_act)
        self.vit_position = PositionEmbedding(config.vit_max_num_patch_per_side, width)
        self.time_embedder = TimestepEmbedder(width)
        self.latent_position = PositionEmbedding(config.max_latent_size, width)
        self.vae2llm = RowLinear(config.latent_dim, width)
        self.llm2vae = RowLinear(width, config.latent_dim)
        self.autoencoder = Autoencoder(config.autoencoder)
        self._initialise()

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Bagel:
        """Load a checkpoint folder in BAGEL's published layout, or the embedded "mini".

        The weights are read one tensor at a time and cast to `dtype` on `device`: memory holds them once.
        Raises `ValueError` naming the file, and the tensor or value, where the folder is not as it must be.
        """
        folder = weights.find_folder(path)
        config = weights.settle_tying(BagelConfig.load(folder), folder)
        with torch.device("meta"):
            model = cls(config)
        weights.load_weights(model, folder, torch.device(device), dtype)
        model.tokenizer = Tokenizer.load(folder)
        if len(model.tokenizer) > config.llm.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has ids up to {len(model.tokenizer) - 1}, the model "
                f"{config.llm.vocab_size} embeddings: they do not belong together"
            )
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configs, tokenizer and weights; `from_pretrained(folder)` gives this model bit for bit."""
        if self.tokenizer is None:
            raise ValueError(
                "this model has no tokenizer: set model.tokenizer = Tokenizer.load(folder) before saving"
            )
        self.config.save(folder)
        self.tokenizer.save(folder)
        weights.save_weights(self, Path(folder))

    def announce_weights(self, names: Collection[str]) -> int:
        """Say that parameters were written in place: what was computed with them is of an old version.

        Returns: the new version.
        """
        self.weights_version += 1
        for listener in self.on_weights_changed:
            listener(names)
        return self.weights_version

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def embed_text(self, ids_L: torch.Tensor) -> torch.Tensor:
        """Token ids, int64 [L], to [L, E]."""
        return self.embed_tokens(ids_L)

    def embed_vit(
        self, patches_LP: torch.Tensor, position_L: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> torch.Tensor:
        """Packed picture patches to [L, E]: `VisionTransformer.forward`, connector, position."""
        hidden_LE = self.connector(self.vit(patches_LP, position_L, cu_seqlens))
        return hidden_LE + self.vit_position(position_L)

    def embed_latent(
        self, latent_LC: torch.Tensor, timestep_L: torch.Tensor, position_L: torch.Tensor
    ) -> torch.Tensor:
        """Latent tokens to [L, E]: projection, flow time, position.

        Args:
            latent_LC: clean or noised latent tokens, see `patchify_latent`.
            timestep_L: float32 flow times, one per token, or one for all ([1]); 0 for clean pictures.
            position_L: int64, rows of the latent position table.
        """
        latent_LC = latent_LC.to(self.vae2llm.weight.dtype)
        return self.vae2llm(latent_LC) + self.time_embedder(timestep_L) + self.latent_position(position_L)

    def logits(self, hidden_LE: torch.Tensor) -> torch.Tensor:
        """Final hidden states to scores of the next token, [L, V]."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return linear_by_rows(hidden_LE, head.weight)

    def velocity(self, hidden_LE: torch.Tensor) -> torch.Tensor:
        """Final hidden states of latent tokens to flow velocities `noise - clean`, [L, C]."""
        return self.llm2vae(hidden_LE)

    def _initialise(self) -> None:
        """Normal weights, zero biases, a velocity of zero; the generation expert copies understanding's.

        The autoencoder keeps torch's own initialisation.
        """
        std = self.config.llm.initializer_range
        for name, module in self.named_modules():
            if name.startswith("autoencoder."):
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.llm2vae.weight)
        for layer in self.decoder.layers:
            layer.gen.load_state_dict(layer.und.state_dict())


def patchify_latent(latent_CHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """A latent to tokens [H/p * W/p, p * p * C], row-major, channels last within a token.

    Raises `ValueError` if a side is not a multiple of `patch_size`.
    """
    channels, height, width = latent_CHW.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height}x{width} cannot be cut into patches of {patch_size}x{patch_size}")
    grid = latent_CHW.unflatten(1, (-1, patch_size)).unflatten(3, (-1, patch_size))  # C, rows, p, columns, p
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch_size**2 * channels)


def unpatchify_latent(latent_LC: torch.Tensor, height: int, width: int, patch_size: int) -> torch.Tensor:
    """The reverse of `patchify_latent`: a grid of `height` x `width` tokens to [C, height * p, width * p]."""
    if len(latent_LC) != height * width:
        raise ValueError(f"{len(latent_LC)} tokens are not a grid of {height}x{width}")
    grid = latent_LC.reshape(height, width, patch_size, patch_size, -1)
    return grid.permute(4, 0, 2, 1, 3).reshape(-1, height * patch_size, width * patch_size)


def patchify_pixels(pixels_CHW: torch.Tensor, patch_size: int) -> torch.Tensor:
    """A picture to ViT patches [L, P]: the same cut as `patchify_latent`."""
    return patchify_latent(pixels_CHW, patch_size)
