"""One entry per op: its shapes, its inputs, the bytes it must move, and what runs it.

A new op adds a `build_` function and a line in `OPS`. L packed tokens, C channels, E width, B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import realign_kernels as ops
from bench import baselines

PLAIN = "torch"  # the name of the baseline in rows


@dataclass(frozen=True)
class Shape:
    """Sizes by name, as they stand in a row: `B4 L1024 C64`."""

    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in self.sizes.items())


@dataclass(frozen=True)
class Case:
    """One op at one shape: the runs to compare, by name, and the bytes of one run, each tensor once."""

    runs: dict[str, Callable[[], Tensor]]
    num_bytes: int
    relative_error: float  # allowed between a run and the plain one


@dataclass(frozen=True)
class Op:
    """How to build the cases of an op, at the shapes worth a row."""

    build: Callable[[Shape], Case]
    shapes: list[Shape] = field(default_factory=list)


def count_bytes(*tensors: Tensor) -> int:
    """Bytes of the tensors, each read or written once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def allow_error(shape: Shape) -> float:
    """Relative error between two runs: a few roundings of the dtype, and the order of a float32 sum."""
    return 4 * torch.finfo(shape.dtype).eps + 1e-5


def list_impls() -> list[str]:
    """The implementations of a flow op that can run here."""
    return ["reference", "cpp"] if ops.native.is_available() else ["reference"]


@dataclass(frozen=True)
class _Flow:
    """Packed fields of equal samples, and the numbers of a guided Euler step."""

    fields: tuple[Tensor, ...]  # sample, cond, text, image
    cu_seqlens: Tensor
    text_scale_B: Tensor
    image_scale_B: Tensor
    a_B: Tensor
    b_B: Tensor

    @classmethod
    def build(cls, shape: Shape) -> _Flow:
        batch, tokens, channels = (shape.sizes[name] for name in "BLC")
        generator = torch.Generator().manual_seed(0)
        sample, *velocities = (torch.randn(batch * tokens, channels, generator=generator) for _ in range(4))
        ones = torch.ones(batch)
        offsets = torch.arange(batch + 1, dtype=torch.int32) * tokens
        # The sampler keeps its samples in float32, whatever the dtype of the model's velocities.
        return cls(
            (sample, *(v.to(shape.dtype) for v in velocities)),
            offsets,
            4 * ones,
            2 * ones,
            ones,
            -0.02 * ones,
        )


def build_guided_flow_step(shape: Shape) -> Case:
    """Both guidances, the global renorm, one Euler step."""
    flow = _Flow.build(shape)
    sample, *branches = flow.fields
    scales, step = (flow.text_scale_B, flow.image_scale_B), (flow.a_B, flow.b_B)

    def plain() -> Tensor:
        velocity = baselines.plain_guided_velocities(*branches, flow.cu_seqlens, 4.0, 2.0)
        return baselines.plain_flow_step(sample, velocity, 0.02)

    def run(impl: str) -> Callable[[], Tensor]:
        return lambda: ops.guided_flow_step(sample, *branches, flow.cu_seqlens, *scales, *step, impl=impl)

    runs = {PLAIN: plain, **{impl: run(impl) for impl in list_impls()}}
    return Case(runs, count_bytes(*flow.fields, sample), allow_error(shape))


def build_guided_velocity(shape: Shape) -> Case:
    """Both guidances and the global renorm."""
    flow = _Flow.build(shape)
    _, *branches = flow.fields

    def run(impl: str) -> Callable[[], Tensor]:
        return lambda: ops.guided_velocity(
            *branches, flow.cu_seqlens, flow.text_scale_B, flow.image_scale_B, impl=impl
        )

    plain = {PLAIN: lambda: baselines.plain_guided_velocities(*branches, flow.cu_seqlens, 4.0, 2.0)}
    runs = {**plain, **{impl: run(impl) for impl in list_impls()}}
    # Plain torch rounds to bfloat16 after every operation, and guidance enlarges what was rounded before.
    error = allow_error(shape) if shape.dtype == torch.float32 else 2e-2
    return Case(runs, count_bytes(*branches, branches[0]), error)


def build_flow_step(shape: Shape) -> Case:
    """One Euler step, the same for all samples."""
    flow = _Flow.build(shape)
    sample, velocity, *_ = flow.fields

    def run(impl: str) -> Callable[[], Tensor]:
        return lambda: ops.flow_step(sample, velocity, flow.cu_seqlens, flow.a_B, flow.b_B, impl=impl)

    plain = {PLAIN: lambda: baselines.plain_flow_step(sample, velocity, 0.02)}
    runs = {**plain, **{impl: run(impl) for impl in list_impls()}}
    return Case(runs, count_bytes(sample, velocity, sample), allow_error(shape))


def build_rms_norm(shape: Shape) -> Case:
    """The norm of an expert's hidden states."""
    x, weight = _randn(shape, "L", "E"), torch.ones(shape.sizes["E"], dtype=shape.dtype)
    runs = {
        PLAIN: lambda: baselines.plain_rms_norm(x, weight, 1e-6),
        "torch.nn.functional": lambda: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6),
        "reference": lambda: ops.rms_norm(x, weight, 1e-6),
    }
    return Case(runs, count_bytes(x, weight, x), allow_error(shape))


def build_apply_rope(shape: Shape) -> Case:
    """Queries or keys turned by given tables."""
    x = _randn(shape, "L", "H", "D")
    angles = torch.rand(shape.sizes["L"], shape.sizes["D"])
    cos, sin = angles.cos(), angles.sin()
    runs = {
        PLAIN: lambda: baselines.plain_apply_rope(x, cos, sin),
        "reference": lambda: ops.apply_rope(x, cos, sin),
    }
    return Case(runs, count_bytes(x, cos, sin, x), allow_error(shape))


def build_swiglu(shape: Shape) -> Case:
    """The MLP's gate."""
    gate, up = _randn(shape, "L", "E"), _randn(shape, "L", "E")
    runs = {
        PLAIN: lambda: baselines.plain_swiglu(gate, up),
        "reference": lambda: ops.swiglu(gate, up),
    }
    return Case(runs, count_bytes(gate, up, gate), allow_error(shape))


def _randn(shape: Shape, *names: str) -> Tensor:
    sizes = [shape.sizes[name] for name in names]
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(shape.dtype)


DTYPES = (torch.float32, torch.bfloat16)
# 1024 and 4096 tokens are pictures of 512 and 1024 pixels on BAGEL, whose latents have 64 channels.
LATENTS = [
    Shape({"B": batch, "L": tokens, "C": 64}, dtype)
    for dtype in DTYPES
    for tokens in (1024, 4096)
    for batch in (1, 4, 16)
]
HIDDEN = [Shape({"L": 1024, "E": width}, dtype) for dtype in DTYPES for width in (128, 3584)]
HEADS = [Shape({"L": 1024, "H": heads, "D": 128}, dtype) for dtype in DTYPES for heads in (4, 28)]

OPS = {
    "guided_flow_step": Op(build_guided_flow_step, LATENTS),
    "guided_velocity": Op(build_guided_velocity, LATENTS),
    "flow_step": Op(build_flow_step, LATENTS),
    "rms_norm": Op(build_rms_norm, HIDDEN),
    "apply_rope": Op(build_apply_rope, HEADS),
    "swiglu": Op(build_swiglu, HIDDEN),
}
