"""The autoencoder: golden numbers, diffusers' numbers, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from realign.libraries import mend_torchvision
from realign.model.autoencoder import Autoencoder
from realign.model.bagel import Bagel
from realign.model.config import AutoencoderConfig

from .helpers import relative_error


def test_golden(golden_model: Bagel, golden: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        latent = golden_model.autoencoder.encode(golden["vae.pixels"])
        pixels = golden_model.autoencoder.decode(golden["vae.latent"])
    assert relative_error(latent, golden["vae.latent"]) < 1e-5
    assert relative_error(pixels, golden["vae.decoded"]) < 1e-5


def test_moments_are_unscaled(small_model: Bagel) -> None:
    autoencoder = small_model.autoencoder
    pixels_BCHW = torch.randn(2, 3, 10, 6)
    with torch.no_grad():
        mean_BCHW, logvar_BCHW = autoencoder.encode_moments(pixels_BCHW)
        latent_BCHW = autoencoder.encode(pixels_BCHW)
    assert mean_BCHW.shape == logvar_BCHW.shape == (2, 3, 5, 3)
    config = autoencoder.config
    torch.testing.assert_close(latent_BCHW, config.scale_factor * (mean_BCHW - config.shift_factor))


def test_each_picture_alone(small_model: Bagel) -> None:
    pixels_BCHW = torch.randn(3, 3, 8, 12)
    with torch.no_grad():
        together = small_model.autoencoder.decode(small_model.autoencoder.encode(pixels_BCHW))
        apart = [small_model.autoencoder.decode(small_model.autoencoder.encode(p[None])) for p in pixels_BCHW]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-5)


def test_every_parameter_has_a_gradient(small_model: Bagel) -> None:
    pixels_BCHW = torch.randn(2, 3, 8, 8)
    mean_BCHW, logvar_BCHW = small_model.autoencoder.encode_moments(pixels_BCHW)
    decoded_BCHW = small_model.autoencoder.decode(mean_BCHW)
    ((decoded_BCHW - pixels_BCHW).square().mean() + logvar_BCHW.exp().mean()).backward()
    for name, parameter in small_model.autoencoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_odd_sides_are_refused(golden_model: Bagel) -> None:
    with pytest.raises(ValueError, match="18x16 pixels: both sides must be multiples of 4"):
        golden_model.autoencoder.encode(torch.zeros(1, 3, 18, 16))


def test_bf16(golden_model: Bagel, golden: dict[str, torch.Tensor]) -> None:
    autoencoder = Autoencoder(golden_model.config.autoencoder)
    autoencoder.load_state_dict(golden_model.autoencoder.state_dict())
    autoencoder.to(torch.bfloat16)
    with torch.no_grad():
        latent = autoencoder.encode(golden["vae.pixels"].bfloat16())
    assert latent.dtype == torch.bfloat16
    assert relative_error(latent, golden["vae.latent"]) < 0.03


def _diffusers_state(state: dict[str, torch.Tensor], num_levels: int) -> dict[str, torch.Tensor]:
    """FLUX names to diffusers' names, and 1x1 convolutions to matrices."""
    converted = {}
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    for name, tensor in state.items():
        side, *rest, leaf = name.split(".")
        match rest:
            case ["mid", "attn_1", module]:
                rest = ["mid_block", "attentions", "0", attention[module]]
                tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
            case ["mid", block, module]:
                rest = ["mid_block", "resnets", str(int(block[-1]) - 1), module]
            case ["down" | "up" as way, level, "block", block, module]:
                number = level if way == "down" else str(num_levels - 1 - int(level))
                rest = [f"{way}_blocks", number, "resnets", block, module.replace("nin", "conv")]
            case ["down" | "up" as way, level, sampler, "conv"]:
                number = level if way == "down" else str(num_levels - 1 - int(level))
                rest = [f"{way}_blocks", number, f"{sampler}rs", "0", "conv"]
            case ["norm_out"]:
                rest = ["conv_norm_out"]
        converted[".".join([side, *rest, leaf])] = tensor
    return converted


def test_same_function_as_diffusers() -> None:
    mend_torchvision()
    import diffusers  # imported late: it takes seconds

    config = AutoencoderConfig(downsample=4, ch=8, ch_mult=(1, 2, 4), z_channels=4, norm_num_groups=4)
    torch.manual_seed(0)
    ours = Autoencoder(config)
    theirs = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[config.ch * mult for mult in config.ch_mult],
        layers_per_block=config.num_res_blocks,
        latent_channels=config.z_channels,
        norm_num_groups=config.norm_num_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    theirs.load_state_dict(_diffusers_state(ours.state_dict(), len(config.ch_mult)), strict=True)
    pixels_BCHW = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        mean_BCHW, logvar_BCHW = ours.encode_moments(pixels_BCHW)
        posterior = theirs.encode(pixels_BCHW).latent_dist
        assert relative_error(mean_BCHW, posterior.mean) < 1e-5
        assert relative_error(logvar_BCHW, posterior.logvar) < 1e-5
        latent_BCHW = ours.encode(pixels_BCHW)
        unscaled_BCHW = latent_BCHW / config.scale_factor + config.shift_factor
        assert relative_error(ours.decode(latent_BCHW), theirs.decode(unscaled_BCHW).sample) < 1e-5
