"""Signature, layout, checks and dispatch of `philox_normal`. L packed tokens, C channels, B samples."""

from __future__ import annotations

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.arguments import NoiseKeys
from realign_kernels.checks import check_cu_seqlens, check_integers
from realign_kernels.dispatch import choose_impl
from realign_kernels.philox_normal.reference import philox_normal_reference


def philox_normal(
    keys: NoiseKeys, cu_seqlens: Tensor, num_tokens: int, num_channels: int, impl: str = "auto"
) -> Tensor:
    """Standard normals of packed samples, each number a function of its key, its step and its place alone.

    Number `e` of a sample (row by row, from the sample's first token) is lane `e % 4` of Philox4x32-10's
    block `(e // 4, step, 0, 0)`. Lanes (0, 1) and (2, 3) are Box-Muller pairs: with `u = ((word_0 >> 8) + 1)
    / 2**24` and `w = (word_1 >> 8) / 2**24`, `sqrt(-2 ln u) cos(2 pi w)` and `sqrt(-2 ln u) sin(2 pi w)`.
    Every path computes them by the same float32 operations in the same order: the bits are equal on every
    path and device.

    Args:
        keys: int64 [B] each, on the device where the numbers are wanted.
        cu_seqlens: int32 [B+1], offsets of the samples, there too.
        num_tokens: L.
        num_channels: C.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: float32 [L, C]; within 1.1e-6 of the formula in exact arithmetic.
    Raises: ValueError naming the argument and its value.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Box and Muller, 1958.
    """
    like_L = cu_seqlens.new_empty(0).expand(num_tokens, 0)
    check_noise_keys(keys, check_cu_seqlens(cu_seqlens, like_L), like_L)
    if num_channels < 0:
        raise ValueError(f"num_channels is {num_channels}: must not be negative")
    path = choose_impl(
        "philox_normal",
        impl,
        (cu_seqlens.new_empty(0, dtype=torch.float32),),
        {"cpp": False, "triton": False},
    )
    arguments = {"key": keys.key_B, "step": keys.step_B, "cu_seqlens": cu_seqlens}
    if path == "cpp":
        return native.philox_normal_cpp(**arguments, num_tokens=num_tokens, num_channels=num_channels)
    if path == "triton":
        from realign_kernels.philox_normal.triton import philox_normal_triton

        return philox_normal_triton(**arguments, num_tokens=num_tokens, num_channels=num_channels)
    return philox_normal_reference(keys.key_B, keys.step_B, cu_seqlens, num_channels)


def check_noise_keys(keys: NoiseKeys, num_samples: int, first: Tensor) -> None:
    """Raise ValueError unless the keys are of `num_samples` samples, on the device of `first`."""
    check_integers("noise.key_B", keys.key_B, num_samples, first)
    check_integers("noise.step_B", keys.step_B, num_samples, first, below=1 << 32)
