"""Signature, formula, checks and dispatch of `merge_attention`. L tokens, H heads, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor

from realign_kernels.checks import check_dtype, check_like, check_no_gradient
from realign_kernels.dispatch import choose_impl
from realign_kernels.merge_attention.cpp import merge_attention_cpp
from realign_kernels.merge_attention.reference import merge_attention_reference


def merge_attention(
    out_a_LHD: Tensor, lse_a_LH: Tensor, out_b_LHD: Tensor, lse_b_LH: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention to two disjoint sets of keys, from attention to each.

    `lse = log(exp(lse_a) + exp(lse_b))`, `out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)`, in float32
    (float64 for float64), rounded once. A side without keys, whose lse is -inf, is not looked at: the result
    is the other's, bit for bit; of two such sides it is 0 and -inf.

    Args:
        out_a_LHD, out_b_LHD: [L, H, D] of one float dtype, the numbers of a head next to each other.
        lse_a_LH, lse_b_LH: [L, H], float32 (float64 for float64), any strides: natural logarithms of the sums
            of the exponentials of each side's scaled scores.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: out [L, H, D] and lse [L, H], as the inputs, contiguous. Not differentiable.
    Raises: ValueError naming the argument and its value, also where a gradient is wanted.
    Source: Dao et al., arXiv 2205.14135, section 3.1.
    """
    check_no_gradient("merge_attention", out_a_LHD, lse_a_LH, out_b_LHD, lse_b_LH)
    _check_outs(out_a_LHD, out_b_LHD)
    wanted = torch.float64 if out_a_LHD.dtype == torch.float64 else torch.float32
    for name, lse_LH in (("lse_a_LH", lse_a_LH), ("lse_b_LH", lse_b_LH)):
        if lse_LH.dtype != wanted or lse_LH.shape != out_a_LHD.shape[:2] or lse_LH.device != out_a_LHD.device:
            raise ValueError(
                f"{name} is {lse_LH.dtype} {tuple(lse_LH.shape)} on {lse_LH.device}: must be {wanted} "
                f"{list(out_a_LHD.shape[:2])} on {out_a_LHD.device}, a number per head of out_a_LHD"
            )
    path = choose_impl("merge_attention", impl, (out_a_LHD, out_b_LHD), {"cpp": False, "triton": False})
    if path == "cpp":
        return merge_attention_cpp(out_a=out_a_LHD, lse_a=lse_a_LH, out_b=out_b_LHD, lse_b=lse_b_LH)
    if path == "triton":
        from realign_kernels.merge_attention.triton import merge_attention_triton

        return merge_attention_triton(out_a_LHD, lse_a_LH, out_b_LHD, lse_b_LH)
    return merge_attention_reference(out_a_LHD, lse_a_LH, out_b_LHD, lse_b_LH)


def _check_outs(out_a_LHD: Tensor, out_b_LHD: Tensor) -> None:
    if out_a_LHD.dim() != 3:
        raise ValueError(f"out_a_LHD has shape {tuple(out_a_LHD.shape)}: must be tokens by heads by head dim")
    check_dtype("out_a_LHD", out_a_LHD.dtype)
    check_like("out_b_LHD", out_b_LHD, "out_a_LHD", out_a_LHD)
    for name, out_LHD in (("out_a_LHD", out_a_LHD), ("out_b_LHD", out_b_LHD)):
        if out_LHD.stride(2) != 1 and out_LHD.shape[2] > 1:
            raise ValueError(
                f"{name} has strides {out_LHD.stride()}: the numbers of a head must lie next to each other"
            )
