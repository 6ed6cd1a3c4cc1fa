"""Which implementation an op runs.

`impl="auto"` takes the first line that fits, of those that the op has:

| tensors                                              | auto        |
|------------------------------------------------------|-------------|
| CPU, float32/bfloat16/float16, extension built       | `cpp`       |
| CUDA, float32/bfloat16/float16, Triton installed     | `triton`    |
| all else                                             | `reference` |

Where a gradient is wanted, a path counts only if it has one. `cuda` is never chosen unasked. An explicit
`impl=` never falls back: what it cannot run is a ValueError that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from realign_kernels import launch, native

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_impl(op: str, impl: str, tensors: Iterable[Tensor | None], paths: Mapping[str, bool]) -> str:
    """Return `"reference"` or one of `paths` for the float tensors of one call of `op`.

    Args:
        paths: the op's implementations beside the reference, and whether each has a backward, best first.

    Raises: ValueError for an unknown `impl`, or for a named one where it cannot run.
    """
    if impl not in ("auto", "reference", *paths):
        raise ValueError(f"{op}: impl is {impl!r}: must be one of {', '.join(('auto', 'reference', *paths))}")
    if impl == "reference":
        return impl
    given = [tensor for tensor in tensors if tensor is not None]
    if impl != "auto":
        obstacle = find_obstacle(impl, given, paths[impl])
        if obstacle:
            raise ValueError(f"{op}: impl={impl!r} cannot run: {obstacle}; use impl='auto' or 'reference'")
        return impl
    for path, has_backward in paths.items():
        if path != "cuda" and _is_native(path, given) and not find_obstacle(path, given, has_backward):
            return path
    return "reference"


def _is_native(path: str, tensors: list[Tensor]) -> bool:
    """`triton` on the CPU is an interpreter: for tests, never chosen unasked."""
    return path != "triton" or (bool(tensors) and all(tensor.device.type == "cuda" for tensor in tensors))


def find_obstacle(path: str, tensors: list[Tensor], has_backward: bool) -> str | None:
    """Say why `path` cannot take these tensors, or None."""
    obstacle = _OBSTACLES[path]()
    if obstacle:
        return obstacle
    needs_backward = not has_backward and torch.is_grad_enabled()
    for tensor in tensors:
        is_placed = tensor.is_cpu if path == "cpp" else tensor.is_cuda
        if not is_placed and (misplaced := _find_misplaced(path, tensor)) is not None:
            return misplaced
        if tensor.dtype not in KERNEL_DTYPES:
            return f"it takes float32, bfloat16 and float16, not {tensor.dtype}"
        if needs_backward and tensor.requires_grad:
            return "it has no gradient and a tensor requires one"
    return None


def _find_misplaced(path: str, tensor: Tensor) -> str | None:
    device = tensor.device.type
    if path == "cpp" and device != "cpu":
        return f"it runs on the CPU and a tensor is on {tensor.device}"
    if path == "triton" and device == "cpu" and not (launch.is_interpreting() or launch.is_recording()):
        return (
            "a tensor is on the CPU, where Triton needs its interpreter (TRITON_INTERPRET=1 before the start)"
        )
    if (path == "cuda" and device != "cuda") or (path == "triton" and device not in ("cpu", "cuda")):
        return f"it runs on a GPU and a tensor is on {tensor.device}"
    return None


def _find_cpp_obstacle() -> str | None:
    return None if native.is_available() else native.describe()


def _find_triton_obstacle() -> str | None:
    return None if launch.has_triton() else "triton is not installed (pip install triton)"


def _find_cuda_obstacle() -> str | None:
    return None if native.has_cuda() else native.describe_cuda()


_OBSTACLES: dict[str, Callable[[], str | None]] = {
    "cpp": _find_cpp_obstacle,
    "triton": _find_triton_obstacle,
    "cuda": _find_cuda_obstacle,
}
