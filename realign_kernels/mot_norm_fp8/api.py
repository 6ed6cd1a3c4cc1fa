"""Signature, formula, checks and dispatch of `mot_norm_fp8`. L packed tokens, E width."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from realign_kernels.checks import check_like, check_no_gradient, check_packed
from realign_kernels.dispatch import choose_impl
from realign_kernels.mot_norm.api import check_weights
from realign_kernels.mot_norm_fp8.cpp import mot_norm_fp8_cpp
from realign_kernels.mot_norm_fp8.reference import mot_norm_fp8_reference
from realign_kernels.quantize_fp8.api import check_scale


def mot_norm_fp8(
    hidden_LE: Tensor,
    weights: Sequence[Tensor],
    num_und: int,
    scale: float,
    eps: float = 1e-6,
    residual_LE: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`mot_norm` of tokens in the order of the experts; generation's are `quantize_fp8(normed, scale)`.

    Generation's normed tokens are not written to memory; they are rounded to their dtype before they are
    quantised, so that the bits are those of the two ops.

    Args:
        hidden_LE: [L, E], any float dtype; understanding's tokens first.
        weights: two tensors [E], float: of understanding, of generation.
        num_und: U, how many tokens are understanding's, 0 to L.
        scale: a positive number: what the quantised result is to be multiplied by.
        eps: added to the mean square.
        residual_LE: [L, E] in the dtype of `hidden_LE`: added first.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` (plain torch quantises) or `"triton"`.
            Understanding's tokens have the bits that they have in `mot_norm` on the same path.

    Returns: normed [U, E], quantised float8_e4m3fn [L - U, E], and the sum [L, E] (`hidden_LE` itself
        without a residual). No gradient.
    Raises: ValueError naming the argument and its value.
    Source: `mot_norm`, `quantize_fp8`.
    """
    check_packed("hidden_LE", hidden_LE)
    check_weights("weights", weights, hidden_LE)
    if len(weights) != 2:
        raise ValueError(f"weights has {len(weights)} tensors: must be understanding's and generation's")
    if not 0 <= num_und <= len(hidden_LE):
        raise ValueError(f"num_und is {num_und}: must be from 0 to {len(hidden_LE)}, the number of tokens")
    check_scale(scale)
    if residual_LE is not None:
        check_like("residual_LE", residual_LE, "hidden_LE", hidden_LE)
    tensors = (hidden_LE, *weights) if residual_LE is None else (hidden_LE, residual_LE, *weights)
    check_no_gradient("mot_norm_fp8", *tensors)
    path = choose_impl("mot_norm_fp8", impl, tensors, {"cpp": False, "triton": False})
    if path == "reference":
        return mot_norm_fp8_reference(hidden_LE, weights, num_und, scale, eps, residual_LE)
    if path == "cpp":
        return mot_norm_fp8_cpp(hidden_LE, weights, num_und, scale, eps, residual_LE)
    from realign_kernels.mot_norm_fp8.triton import mot_norm_fp8_triton

    normed_UE, quantized_GE, total_LE = mot_norm_fp8_triton(
        hidden_LE, residual_LE, *weights, num_und, scale, eps
    )
    return normed_UE, quantized_GE, hidden_LE if residual_LE is None else total_LE
