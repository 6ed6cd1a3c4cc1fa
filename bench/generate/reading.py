"""How the reference turns texts and pictures into contexts: a forward for each part, on one context.

Source: ByteDance-Seed/Bagel, `forward_cache_update_text`, `_vae`, `_vit` of `modeling/bagel/bagel.py`.

L tokens, C numbers of a latent token, E width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.generate.clock import Clock, NoClock
from bench.generate.forward import Cache, Layout, as_linear, lay_out_picture, lay_out_text, run_decoder
from realign.model.bagel import Bagel, patchify_latent, patchify_pixels
from realign.model.embeddings import flattened_position_ids
from realign.runtime.prepare import PreparedPicture


class ContextReader:
    """Reads into one context at a time.

    Args:
        clock: is told what the autoencoder takes.
    """

    def __init__(self, model: Bagel, clock: Clock | NoClock) -> None:
        self.model, self.clock = model, clock
        markers = (model.tokenizer.start_of_image, model.tokenizer.end_of_image)
        self.marker_ids = torch.tensor(markers, device=model.device)

    def read_text(self, cache: Cache, text: str) -> None:
        """A text turn between bos and eos: one causal forward."""
        tokenizer, device = self.model.tokenizer, self.model.device
        ids_L = torch.tensor([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos], device=device)
        layout = lay_out_text(cache, len(ids_L), device)
        self._read(cache, self.model.embed_text(ids_L), layout, num_positions=len(ids_L))

    def score_next(self, cache: Cache, token: int) -> Tensor:
        """Reads one token; scores of what follows it, [V]."""
        model = self.model
        hidden_LE = model.embed_text(torch.tensor([token], device=model.device))
        hidden_LE = self._read(cache, hidden_LE, lay_out_text(cache, 1, model.device), num_positions=1)
        return as_linear(model.embed_tokens if model.lm_head is None else model.lm_head)(hidden_LE)[0]

    def read_picture(self, cache: Cache, picture: PreparedPicture) -> None:
        """The autoencoder's latents, then the ViT's features: a forward each."""
        self.read_vae(cache, picture.vae_CHW)
        self.read_vit(cache, picture.vit_CHW)

    def read_vae(self, cache: Cache, pixels_CHW: Tensor) -> None:
        """Clean latents of a picture, at time 0."""
        model, patch = self.model, self.model.config.latent_patch_size
        pixels_1CHW = pixels_CHW[None].to(model.device, model.dtype, memory_format=torch.channels_last)
        with self.clock.phase("autoencoder"):
            latent_LC = patchify_latent(model.autoencoder.encode(pixels_1CHW)[0], patch)
        place_L = self.find_places(*pixels_CHW.shape[1:])
        framed_LE = self.embed_latent(latent_LC, torch.zeros(1, device=model.device), place_L)
        layout = lay_out_picture(cache, len(framed_LE), model.device, is_latent=True)
        self._read(cache, framed_LE, layout, num_positions=1)

    def read_vit(self, cache: Cache, pixels_CHW: Tensor) -> None:
        """The ViT's features of a picture."""
        model, config = self.model, self.model.config
        patch = config.vit.patch_size
        patches_LP = patchify_pixels(pixels_CHW.to(model.device), patch)
        grid = (side // patch for side in pixels_CHW.shape[1:])
        place_L = flattened_position_ids(*grid, config.vit_max_num_patch_per_side, config.interpolate_pos)
        bounds = torch.tensor([0, len(patches_LP)], dtype=torch.int32, device=model.device)
        framed_LE = self._frame(model.embed_vit(patches_LP, place_L.to(model.device), bounds))
        layout = lay_out_picture(cache, len(framed_LE), model.device, is_latent=False)
        self._read(cache, framed_LE, layout, num_positions=1)

    def embed_latent(self, latent_LC: Tensor, time_L: Tensor, place_L: Tensor) -> Tensor:
        """Latent tokens, clean or noised, between the markers: [L + 2, E]."""
        model = self.model
        embedded_LE = as_linear(model.vae2llm)(latent_LC.to(model.dtype)) + model.time_embedder(time_L)
        return self._frame(embedded_LE + model.latent_position(place_L))

    def find_places(self, height: int, width: int) -> Tensor:
        """Rows of the latent position table of a picture's tokens."""
        config = self.model.config
        grid = (height // config.latent_stride, width // config.latent_stride)
        place_L = flattened_position_ids(*grid, config.max_latent_size, config.interpolate_pos)
        return place_L.to(self.model.device)

    def _frame(self, tokens_LE: Tensor) -> Tensor:
        start_1E, end_1E = self.model.embed_text(self.marker_ids).split(1)
        return torch.cat((start_1E, tokens_LE.to(start_1E.dtype), end_1E))

    @torch.no_grad()
    def _read(self, cache: Cache, hidden_LE: Tensor, layout: Layout, num_positions: int) -> Tensor:
        hidden_LE = run_decoder(self.model, hidden_LE, layout, cache, does_update=True)
        cache.length += len(hidden_LE)
        cache.next_position += num_positions
        return hidden_LE
