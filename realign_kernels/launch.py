"""Launches Triton kernels: the one place that starts them, or records what would be started.

Arithmetic is compiled without contraction into fused multiply-adds: a kernel then gives the bits that plain
torch gives wherever no sum is involved, on every chip. Triton is optional: without it nothing is launched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch as it would happen: what compiling the kernel ahead of time needs to know.

    Attributes:
        kernel: the `triton.jit` function.
        grid: numbers of programs.
        arguments: its run-time arguments in order; None where a pointer is not given.
        constants: its `tl.constexpr` arguments by name.
        num_warps, num_stages: the compiler's options.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_recorder: Callable[[Launch], None] | None = None


@cache
def has_triton() -> bool:
    """True if Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def is_interpreting() -> bool:
    """True if Triton runs kernels in Python, on CPU tensors: TRITON_INTERPRET=1 before its first import."""
    return has_triton() and os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def launch(
    kernel: Any,
    grid: Sequence[int],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Run `kernel` on every program of `grid`; an empty grid is no launch. Device errors surface later."""
    if _recorder is not None:
        _recorder(Launch(kernel, tuple(grid), arguments, constants, num_warps, num_stages))
        return
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[tuple(grid)](*arguments, **constants, **options)


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect launches, run none: `impl="triton"` then takes CPU tensors, and results are garbage."""
    global _recorder
    launches: list[Launch] = []
    previous, _recorder = _recorder, launches.append
    try:
        yield launches
    finally:
        _recorder = previous


def is_recording() -> bool:
    """True inside `record_launches`."""
    return _recorder is not None
