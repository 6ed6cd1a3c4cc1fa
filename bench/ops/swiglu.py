"""swiglu: the MLP's gate; with a backward, both gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import baselines
from bench.case import PLAIN, Case, Compile, Op, Run, Shape, allow_error, count_bytes, list_impls, randn
from bench.gradients import differentiate
from realign_kernels import swiglu

SHAPES = [
    Shape({"L": 1024, "E": width}, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for width in (384, 3584)
]
GPU_SHAPES = [Shape({"L": length, "E": 18944}, torch.bfloat16) for length in (16384, 4096, 1024)]


def build(shape: Shape, device: torch.device) -> Case:
    """The product alone."""
    gate_LE, up_LE, _ = _inputs(shape, device)
    runs = {name: lambda f=f: f(gate_LE, up_LE) for name, f in _functions(device).items()}
    return Case(runs, 3 * count_bytes(gate_LE), allow_error(shape))


def build_backward(shape: Shape, device: torch.device) -> Case:
    """The product, and the gradients of gate and up."""
    *inputs, grad_LE = _inputs(shape, device)

    def run(function) -> Run:
        return lambda: differentiate(function, inputs, [grad_LE])

    def compile_plain(compile_: Compile) -> Run:
        return run(compile_(baselines.plain_swiglu))

    runs = {name: run(function) for name, function in _functions(device).items()}
    # Forward: two in, one out. Backward: three in, two out.
    return Case(runs, 8 * count_bytes(grad_LE), allow_error(shape), compiled=compile_plain)


def _inputs(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(randn(shape, device, "L", "E", seed=seed) for seed in range(3))


def _functions(device: torch.device) -> dict:
    functions = {PLAIN: baselines.plain_swiglu}
    for impl in list_impls(["cpp", "triton"], device):
        functions[impl] = lambda gate, up, impl=impl: swiglu(gate, up, impl=impl)
    liger = baselines.find_library("liger_kernel.transformers.functional")
    if liger is not None and device.type == "cuda":
        functions["liger"] = liger.liger_swiglu
    return functions


OPS = {
    "swiglu": Op(build, SHAPES, GPU_SHAPES),
    "swiglu.backward": Op(build_backward, SHAPES, GPU_SHAPES),
}
