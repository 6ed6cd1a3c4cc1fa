"""Checks shared by the ops on packed samples. L packed tokens, C channels, B samples.

Shapes, dtypes and devices are always checked. Values (offsets, scales, deviations) are checked where the
tensors are on a CPU; on another device reading them would stall the launch queue, so there they are the
caller's duty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPE_NAMES = "float32, bfloat16, float16 or float64"


def can_read_values(tensor: Tensor) -> bool:
    """True where reading the numbers costs no device sync and no graph break."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def check_packed(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is a [L, C] float tensor."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: must be packed tokens by channels, [L, C]")
    check_dtype(name, tensor.dtype)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless `dtype` is one that ops take; `name` is of a tensor, or "dtype" itself."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} {'is' if name == 'dtype' else 'has dtype'} {dtype}: must be {DTYPE_NAMES}")


def check_no_gradient(op: str, *tensors: Tensor) -> None:
    """Raise ValueError if a gradient is wanted of an op that has none on any path."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{op}: a tensor requires a gradient, and this op has none: use torch.no_grad()")


def check_like(name: str, tensor: Tensor, first_name: str, first: Tensor, *, same_dtype: bool = True) -> None:
    """Raise ValueError unless `tensor` has the shape, device and (if asked) dtype of `first`."""
    if tensor.shape != first.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: must be that of {first_name}, {tuple(first.shape)}"
        )
    if tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {first.device} with {first_name}")
    if not same_dtype:
        check_dtype(name, tensor.dtype)
    elif tensor.dtype != first.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}: must be that of {first_name}, {first.dtype}")


def check_cu_seqlens(cu_seqlens: Tensor, first: Tensor) -> int:
    """Raise ValueError unless `cu_seqlens` is int32 [B+1], 0 to L without going down. Returns B."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: "
            "must be int32 [B+1], sample offsets from 0 to L"
        )
    if cu_seqlens.device != first.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}: must be on {first.device} with the tokens")
    if can_read_values(cu_seqlens):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != first.shape[0] or offsets != sorted(offsets):
            raise ValueError(
                f"cu_seqlens is {offsets}: must rise from 0 to the number of tokens, {first.shape[0]}"
            )
    return cu_seqlens.numel() - 1


def check_per_sample(
    name: str, number_B: Tensor, num_samples: int, first: Tensor, minimum: float = -math.inf
) -> None:
    """Raise ValueError unless `number_B` is float32 [B], finite and at least `minimum`."""
    if number_B.dtype != torch.float32 or number_B.shape != (num_samples,):
        raise ValueError(
            f"{name} is {number_B.dtype} {tuple(number_B.shape)}: "
            f"must be float32 [{num_samples}], one number per sample"
        )
    _check_place(name, number_B, first)
    if can_read_values(number_B):
        numbers = number_B.tolist()
        # A sum of float32 numbers, taken in float64, is finite if and only if they all are.
        is_below = minimum > -math.inf and min(numbers, default=minimum) < minimum
        if is_below or not math.isfinite(sum(numbers)):
            _refuse_number(name, numbers, minimum)


def _refuse_number(name: str, numbers: list[float], minimum: float) -> None:
    for sample, number in enumerate(numbers):
        if not math.isfinite(number) or number < minimum:
            bound = "finite" if minimum == -math.inf else f"finite and at least {minimum:g}"
            raise ValueError(f"{name}[{sample}] is {number:g}: must be {bound}")


def check_integers(
    name: str, number_B: Tensor, num_samples: int, first: Tensor, below: int = 1 << 63
) -> None:
    """Raise ValueError unless `number_B` is int64 [B], and from 0 to `below` if that is given."""
    if number_B.dtype != torch.int64 or number_B.shape != (num_samples,):
        raise ValueError(
            f"{name} is {number_B.dtype} {tuple(number_B.shape)}: "
            f"must be int64 [{num_samples}], one number per sample"
        )
    _check_place(name, number_B, first)
    if below < 1 << 63 and can_read_values(number_B):
        for sample, number in enumerate(number_B.tolist()):
            if not 0 <= number < below:
                raise ValueError(f"{name}[{sample}] is {number}: must be from 0 to {below - 1}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: must be one of {', '.join(choices)}")


def _check_place(name: str, tensor: Tensor, first: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {first.device} with the tokens")
