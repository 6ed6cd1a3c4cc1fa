"""The FLUX autoencoder: pixels to latents and back.

Module names are the published key names (`ae.safetensors`), so weights load and save without renaming.
diffusers' `AutoencoderKL` computes the same function, and was compared (`tests/model/test_autoencoder.py`);
it is not used because it cannot hold these weights as they are: it keeps the middle attention's 1x1
convolutions as linear layers, numbers the decoder's levels backwards, and ties the width of `conv_in` to the
first level, so that `ch_mult[0] != 1` has no counterpart. It would also add some 3.5 s to every start of a
program.

Shapes: `B` pictures, `C` channels, `H`, `W` sides; latents are `downsample` times smaller per side.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from realign.model.config import AutoencoderConfig

NORM_EPS = 1e-6


class Autoencoder(nn.Module):
    """KL autoencoder of FLUX (black-forest-labs/flux, Apache-2.0; there `AutoEncoder`)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """Pixels in [-1, 1] to the scaled mean of the posterior: `scale_factor * (mean - shift_factor)`."""
        mean_BCHW, _ = self.encode_moments(pixels_BCHW)
        return self.config.scale_factor * (mean_BCHW - self.config.shift_factor)

    def encode_moments(self, pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the posterior, unscaled, `z_channels` each."""
        _check_sides(pixels_BCHW, self.config.downsample)
        mean_BCHW, logvar_BCHW = self.encoder(pixels_BCHW).chunk(2, dim=1)
        return mean_BCHW, logvar_BCHW

    def decode(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        """Scaled latents to pixels, about in [-1, 1] (not clamped)."""
        return self.decoder(latent_BCHW / self.config.scale_factor + self.config.shift_factor)


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.conv_in = _conv3(config.in_channels, config.ch)
        self.down = nn.ModuleList()
        width = config.ch
        for level, mult in enumerate(config.ch_mult):
            widths = [width] + [config.ch * mult] * config.num_res_blocks
            is_last = level == len(config.ch_mult) - 1
            self.down.append(DownLevel(widths, config.norm_num_groups, has_downsample=not is_last))
            width = widths[-1]
        self.mid = Middle(width, config.norm_num_groups)
        self.norm_out = _norm(width, config.norm_num_groups)
        self.conv_out = _conv3(width, 2 * config.z_channels)

    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        hidden_BCHW = self.conv_in(pixels_BCHW)
        for level in self.down:
            hidden_BCHW = level(hidden_BCHW)
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden_BCHW))))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.ch * config.ch_mult[-1]
        self.conv_in = _conv3(config.z_channels, width)
        self.mid = Middle(width, config.norm_num_groups)
        levels: list[nn.Module] = []
        for level, mult in reversed(list(enumerate(config.ch_mult))):
            widths = [width] + [config.ch * mult] * (config.num_res_blocks + 1)
            levels.append(UpLevel(widths, config.norm_num_groups, has_upsample=level > 0))
            width = widths[-1]
        self.up = nn.ModuleList(reversed(levels))  # numbered from the finest, run from the coarsest
        self.norm_out = _norm(width, config.norm_num_groups)
        self.conv_out = _conv3(width, config.out_ch)

    def forward(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        hidden_BCHW = self.mid(self.conv_in(latent_BCHW))
        for level in reversed(self.up):
            hidden_BCHW = level(hidden_BCHW)
        return self.conv_out(F.silu(self.norm_out(hidden_BCHW)))


class DownLevel(nn.Module):
    """Residual blocks, then half the side."""

    def __init__(self, widths: list[int], num_groups: int, has_downsample: bool) -> None:
        super().__init__()
        self.block = _resnet_blocks(widths, num_groups)
        if has_downsample:
            self.downsample = Downsample(widths[-1])

    def forward(self, hidden_BCHW: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            hidden_BCHW = block(hidden_BCHW)
        return self.downsample(hidden_BCHW) if hasattr(self, "downsample") else hidden_BCHW


class UpLevel(nn.Module):
    """Residual blocks, then twice the side."""

    def __init__(self, widths: list[int], num_groups: int, has_upsample: bool) -> None:
        super().__init__()
        self.block = _resnet_blocks(widths, num_groups)
        if has_upsample:
            self.upsample = Upsample(widths[-1])

    def forward(self, hidden_BCHW: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            hidden_BCHW = block(hidden_BCHW)
        return self.upsample(hidden_BCHW) if hasattr(self, "upsample") else hidden_BCHW


class Downsample(nn.Module):
    """Stride-2 convolution, padded on the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, stride=2)

    def forward(self, hidden_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(hidden_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3(width, width)

    def forward(self, hidden_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(hidden_BCHW, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, width: int, num_groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width, num_groups)
        self.attn_1 = SpatialAttention(width, num_groups)
        self.block_2 = ResnetBlock(width, width, num_groups)

    def forward(self, hidden_BCHW: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden_BCHW)))


class ResnetBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`; the shortcut is a 1x1 convolution where widths differ."""

    def __init__(self, width_in: int, width_out: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in, num_groups)
        self.conv1 = _conv3(width_in, width_out)
        self.norm2 = _norm(width_out, num_groups)
        self.conv2 = _conv3(width_out, width_out)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, kernel_size=1)

    def forward(self, hidden_BCHW: torch.Tensor) -> torch.Tensor:
        branch_BCHW = self.conv1(F.silu(self.norm1(hidden_BCHW)))
        branch_BCHW = self.conv2(F.silu(self.norm2(branch_BCHW)))
        shortcut_BCHW = self.nin_shortcut(hidden_BCHW) if hasattr(self, "nin_shortcut") else hidden_BCHW
        return shortcut_BCHW + branch_BCHW


class SpatialAttention(nn.Module):
    """One head over all places of the coarsest level."""

    def __init__(self, width: int, num_groups: int) -> None:
        super().__init__()
        self.norm = _norm(width, num_groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, kernel_size=1) for _ in range(4))

    def forward(self, hidden_BCHW: torch.Tensor) -> torch.Tensor:
        normed_BCHW = self.norm(hidden_BCHW)
        query, key, value = (_places_first(conv(normed_BCHW)) for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query, key, value)
        attended_BCHW = attended[:, 0].transpose(1, 2).reshape(hidden_BCHW.shape)
        return hidden_BCHW + self.proj_out(attended_BCHW)


def _places_first(hidden_BCHW: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] to [B, 1, H*W, C], one head."""
    return hidden_BCHW.flatten(2).transpose(1, 2).unsqueeze(1)


def _resnet_blocks(widths: list[int], num_groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResnetBlock(a, b, num_groups) for a, b in pairwise(widths))


def _conv3(width_in: int, width_out: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, kernel_size=3, padding=1)


def _norm(width: int, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, width, eps=NORM_EPS)


def _check_sides(pixels_BCHW: torch.Tensor, multiple: int) -> None:
    height, width = pixels_BCHW.shape[-2:]
    if height % multiple or width % multiple:
        raise ValueError(f"picture of {height}x{width} pixels: both sides must be multiples of {multiple}")
