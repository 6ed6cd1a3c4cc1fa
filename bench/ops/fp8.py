"""The fp8 ops of the generation expert: what a linear reads, in one pass; plain torch takes a pass a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import baselines
from bench.case import PLAIN, Case, Op, Shape, count_bytes, list_impls, randn
from realign_kernels import mot_norm_fp8, quantize_fp8, swiglu_fp8

SCALE, EPS = 2.0**-6, 1e-6
MARKERS = 2  # understanding's tokens of a picture
# A float8 that rounds the other way is a step of an eighth off; few do.
RELATIVE_ERROR = 2e-2
SHAPES = [Shape({"L": 1024, "E": 384}, torch.bfloat16)]
GPU_SHAPES = [Shape({"L": length, "E": 3584}, torch.bfloat16) for length in (16392, 4098, 1026)]
GPU_MLP_SHAPES = [Shape({"L": length, "E": 18944}, torch.bfloat16) for length in (16392, 4098, 1026)]


def plain_quantize(x: Tensor) -> Tensor:
    return (x.float() / SCALE).clamp(-448, 448).to(torch.float8_e4m3fn)


def plain_swiglu_fp8(gate_up_LE: Tensor) -> Tensor:
    return plain_quantize(baselines.plain_swiglu(*gate_up_LE.chunk(2, dim=1)))


def plain_norm_fp8(hidden: Tensor, residual: Tensor, und: Tensor, gen: Tensor) -> tuple[Tensor, ...]:
    total = residual + hidden
    normed = baselines.plain_rms_norm(total[:MARKERS], und, EPS)
    return normed, plain_quantize(baselines.plain_rms_norm(total[MARKERS:], gen, EPS)), total


def _compare(
    plain: Callable, ours: Callable, inputs: list[Tensor], device: torch.device, paths: Sequence[str]
) -> dict:
    runs = {PLAIN: lambda: plain(*inputs)}
    for impl in list_impls(paths, device):
        runs[impl] = lambda impl=impl: ours(*inputs, impl)
    return runs


def build_quantize(shape: Shape, device: torch.device) -> Case:
    """Attention's result."""
    x = randn(shape, device, "L", "E")
    runs = _compare(plain_quantize, lambda x, impl: quantize_fp8(x, SCALE, impl), [x], device, ["triton"])
    return Case(runs, count_bytes(x) + x.numel(), RELATIVE_ERROR)


def build_swiglu(shape: Shape, device: torch.device) -> Case:
    """The gated activation."""
    gate_up_LE = torch.cat([randn(shape, device, "L", "E", seed=seed) for seed in range(2)], dim=1)
    paths = ["cpp", "triton"]
    runs = _compare(plain_swiglu_fp8, lambda x, impl: swiglu_fp8(x, SCALE, impl), [gate_up_LE], device, paths)
    return Case(runs, count_bytes(gate_up_LE) + gate_up_LE.numel() // 2, RELATIVE_ERROR)


def build_norm(shape: Shape, device: torch.device) -> Case:
    """Residual and norm of one picture's tokens."""
    rows = [randn(shape, device, "L", "E", seed=seed) for seed in range(2)]
    weights = [1 + 0.1 * randn(shape, device, "E", seed=seed) for seed in (2, 3)]

    def ours(hidden: Tensor, residual: Tensor, und: Tensor, gen: Tensor, impl: str) -> tuple[Tensor, ...]:
        return mot_norm_fp8(hidden, [und, gen], MARKERS, SCALE, EPS, residual, impl)

    num_bytes = 3 * count_bytes(rows[0]) + rows[0].numel() + count_bytes(*weights)
    runs = _compare(plain_norm_fp8, ours, [*rows, *weights], device, ["cpp", "triton"])
    return Case(runs, num_bytes, RELATIVE_ERROR)


OPS = {
    "quantize_fp8": Op(build_quantize, SHAPES, GPU_SHAPES),
    "swiglu_fp8": Op(build_swiglu, SHAPES, GPU_MLP_SHAPES),
    "mot_norm_fp8": Op(build_norm, SHAPES, GPU_SHAPES),
}
