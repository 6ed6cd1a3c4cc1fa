"""What a bench entry is made of: an op, its shapes, and a case, the runs to compare at one shape.

`bench/ops/NAME.py` describes an op with these and holds them in `OPS`; `bench.registry` collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from realign_kernels import launch, native

PLAIN = (
    "torch"  # the run that all others are compared with: plain torch, as the reference repositories write it
)
OURS = ("reference", "cpp", "triton", "cuda")  # the names of our own implementations; all else is a baseline

Run = Callable[[], Tensor | tuple[Tensor, ...]]
Compile = Callable[[Callable], Callable]


@dataclass(frozen=True)
class Shape:
    """Sizes by name, as they stand in a row (`B4 L1024 C64`), and the dtype of the model's tensors."""

    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in self.sizes.items())


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        runs: what is timed, by name. "torch" is plain torch and must be there; "reference", "cpp", "triton",
            "cuda" are the op's public function with `impl=`; other names are libraries. A run takes nothing,
            makes fresh results and returns them, and never reads a device tensor's numbers on the host. All
            are called under `torch.no_grad`: one with gradients in it enables them itself.
        num_bytes: bytes of one run at least: each input read once, each output written once.
        relative_error: allowed between a run and the plain one, ||run - plain|| / ||plain|| of each result. A
            run of ours has as many results as the plain one; a library's may have the first few alone.
        num_flops: operations of one run, for ops that are matrix products; else 0.
        compiled: makes the `torch.compile` baseline of the GPU table: given `compile`, it returns a run.
            Where None, the plain run is compiled whole. One that loops over samples would compile for
            minutes: compile a form without the loop. Of a backward run only the forward pass can be
            compiled: call what `compile` gives once, here, and differentiate in the run.
    """

    runs: dict[str, Run]
    num_bytes: int
    relative_error: float
    num_flops: int = 0
    compiled: Callable[[Compile], Run] | None = None


@dataclass(frozen=True)
class Op:
    """How to build the cases of an op, and the shapes worth a row, the most telling first.

    Attributes:
        build: makes the tensors on a device and the runs that can run there.
        shapes: for the CPU table: small enough for a run in some 10 ms.
        gpu_shapes: BAGEL's sizes.
    """

    build: Callable[[Shape, torch.device], Case]
    shapes: list[Shape] = field(default_factory=list)
    gpu_shapes: list[Shape] = field(default_factory=list)


def count_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors, each read or written once; None counts nothing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def allow_error(shape: Shape) -> float:
    """Relative error between two runs: a few roundings of the dtype, and the order of a float32 sum."""
    return 4 * torch.finfo(shape.dtype).eps + 1e-5


def randn(shape: Shape, device: torch.device, *names: str, seed: int = 0) -> Tensor:
    """Normal numbers in the shape's dtype, of the sizes named: `randn(shape, device, "L", "E")`."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = [shape.sizes[name] for name in names]
    return torch.randn(sizes, generator=generator, device=device).to(shape.dtype)


def list_impls(paths: Iterable[str], device: torch.device) -> list[str]:
    """Those of `paths`, and first "reference", that can run for tensors on `device` in this process.

    On a CPU, Triton runs in its interpreter (to check a case: its times say nothing) or is recorded.
    """
    is_cuda = device.type == "cuda"
    can_launch = is_cuda or launch.is_recording() or launch.is_interpreting()
    can_run = {
        "cpp": not is_cuda and native.is_available(),
        "triton": launch.has_triton() and can_launch,
        "cuda": is_cuda and native.has_cuda(),
    }
    return ["reference", *(path for path in paths if path != "reference" and can_run[path])]
