"""Which implementation an op runs.

`impl="auto"` is this table, read from the top:

| tensors                                             | auto        |
|-----------------------------------------------------|-------------|
| CPU, float32/bfloat16/float16, no gradient, built   | `cpp`       |
| all else                                            | `reference` |

"built" means that the compiled extension `realign_kernels._C` is there. An explicit `impl=` never falls back:
what it cannot run is a ValueError that says why.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from realign_kernels import native

IMPLS = ("auto", "reference", "cpp")
CPP_DTYPES = tuple(native.DTYPE_CODES)


def choose_impl(op: str, impl: str, tensors: Iterable[Tensor | None]) -> str:
    """Return `"reference"` or `"cpp"` for the float tensors of one call of `op`.

    Raises: ValueError for an unknown `impl`, or for `"cpp"` where it cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl is {impl!r}: must be one of {', '.join(IMPLS)}")
    if impl == "reference":
        return impl
    obstacle = _find_cpp_obstacle(tensors)
    if impl == "cpp" and obstacle:
        raise ValueError(f"{op}: impl='cpp' cannot run: {obstacle}; use impl='auto' or 'reference'")
    return "reference" if obstacle else "cpp"


def _find_cpp_obstacle(tensors: Iterable[Tensor | None]) -> str | None:
    """Say why the compiled CPU path cannot take these tensors, or None."""
    if not native.is_available():
        return native.describe()
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"it runs on the CPU and a tensor is on {tensor.device}"
        if tensor.dtype not in CPP_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {tensor.dtype}"
        if tensor.requires_grad and torch.is_grad_enabled():
            return "it has no gradient and a tensor requires one"
    return None
