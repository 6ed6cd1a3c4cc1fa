"""Signature, formula, checks and dispatch of `decode_attention`.

R rows, H query heads, K key-value heads, S tokens of a slot, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from realign_kernels.checks import can_read_values, check_dtype, check_no_gradient
from realign_kernels.decode_attention.cpp import decode_attention_cpp
from realign_kernels.decode_attention.reference import decode_attention_reference
from realign_kernels.dispatch import choose_impl


def decode_attention(
    query_RHD: Tensor, key_RKSD: Tensor, value_RKSD: Tensor, length_R: Tensor, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of one query token per row to the first tokens of the row's own slot.

    `lse = log sum_s exp(q k_s / sqrt(D))`, `out = sum_s exp(q k_s / sqrt(D) - lse) v_s` for `s < length`;
    query head h sees key-value head `h // (H / K)`. Arithmetic and sums are float32 (float64 for float64),
    rounded once. A row's bits follow from its own query, keys, values and length alone.

    Args:
        query_RHD: [R, H, D], any float dtype.
        key_RKSD, value_RKSD: [R, K, S, D] of the same dtype, with any strides but 1 for D: slots may lie as
            [R, S, K, D], and one prefix may be every row's (`expand`). Nothing is copied; what lies behind a
            row's length is not read.
        length_R: int64 or int32 [R], from 0 to S. On a GPU longer ones count as S, as no one looks at them.
        impl: `"auto"` (table in `dispatch.py`), `"reference"`, `"cpp"` or `"triton"`.

    Returns: out [R, H, D] in the dtype of the query, and lse [R, H], float32 (float64 for float64), a natural
        logarithm; a row without tokens has 0 and -inf. Not differentiable.
    Raises: ValueError naming the argument and its value, also where a gradient is wanted.
    Source: Ainslie et al., arXiv 2305.13245 (grouped queries); Dao et al., arXiv 2205.14135, section 3.1.
    """
    check_no_gradient("decode_attention", query_RHD, key_RKSD, value_RKSD)
    _check_heads(query_RHD, key_RKSD, value_RKSD)
    _check_length(length_R, query_RHD, key_RKSD.shape[2])
    tensors = (query_RHD, key_RKSD, value_RKSD)
    path = choose_impl("decode_attention", impl, tensors, {"cpp": False, "triton": False})
    if path == "cpp":
        return decode_attention_cpp(query=query_RHD, key=key_RKSD, value=value_RKSD, length=length_R)
    if path == "triton":
        from realign_kernels.decode_attention.triton import decode_attention_triton

        return decode_attention_triton(query_RHD, key_RKSD, value_RKSD, length_R)
    return decode_attention_reference(query_RHD, key_RKSD, value_RKSD, length_R)


def _check_heads(query_RHD: Tensor, key_RKSD: Tensor, value_RKSD: Tensor) -> None:
    if query_RHD.dim() != 3 or not query_RHD.shape[2]:
        raise ValueError(f"query_RHD has shape {tuple(query_RHD.shape)}: must be rows by heads by head dim")
    check_dtype("query_RHD", query_RHD.dtype)
    num_rows, num_heads, dim = query_RHD.shape
    shape, dtype, device = key_RKSD.shape, query_RHD.dtype, query_RHD.device
    if len(shape) != 4 or value_RKSD.shape != shape or shape[0] != num_rows or shape[3] != dim:
        raise ValueError(
            f"key_RKSD and value_RKSD have shapes {tuple(shape)} and {tuple(value_RKSD.shape)}: "
            f"both must be [{num_rows}, K, S, {dim}], to go with query_RHD"
        )
    for name, slots in (("key_RKSD", key_RKSD), ("value_RKSD", value_RKSD)):
        if slots.stride(3) != 1 and dim > 1:
            raise ValueError(
                f"{name} has strides {slots.stride()}: the numbers of a head must lie next to each other"
            )
        if slots.dtype is not dtype or slots.device != device:
            raise ValueError(
                f"{name} is {slots.dtype} on {slots.device}: must be {dtype} on {device}, as query_RHD"
            )
    if not shape[1] or num_heads % shape[1]:
        raise ValueError(f"key_RKSD has {shape[1]} heads: must be a divisor of the query's {num_heads}")


def _check_length(length_R: Tensor, query_RHD: Tensor, num_tokens: int) -> None:
    is_integer = length_R.dtype is torch.int64 or length_R.dtype is torch.int32
    is_per_row = length_R.dim() == 1 and length_R.shape[0] == query_RHD.shape[0]
    if not is_integer or not is_per_row or length_R.device != query_RHD.device:
        raise ValueError(
            f"length_R is {length_R.dtype} {tuple(length_R.shape)} on {length_R.device}: "
            f"must be int64 or int32 [{len(query_RHD)}] on {query_RHD.device}, a number of tokens per row"
        )
    if can_read_values(length_R) and (lengths := length_R.tolist()):
        for wrong in (min(lengths), max(lengths)):
            if not 0 <= wrong <= num_tokens:
                raise ValueError(
                    f"length_R holds {wrong}: must be from 0 to {num_tokens}, the tokens of a slot"
                )
