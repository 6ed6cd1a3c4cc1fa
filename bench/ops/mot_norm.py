"""mot_norm: residual and norm of tokens of W experts, a quarter the first's, alone and with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import baselines
from bench.case import PLAIN, Case, Compile, Op, Run, Shape, allow_error, count_bytes, list_impls, randn
from bench.gradients import differentiate
from realign_kernels import mot_norm

EPS = 1e-6
SHAPES = [
    Shape({"L": 1024, "E": width, "W": 2}, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for width in (128, 3584)
]
GPU_SHAPES = [
    Shape({"L": length, "E": 3584, "W": experts}, torch.bfloat16)
    for length, experts in ((65536, 2), (4096, 2), (1024, 2), (65536, 1))
]
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Norm:
    """Hidden states, residual and weights, and which tokens are whose."""

    hidden_LE: Tensor
    residual_LE: Tensor
    weights: tuple[Tensor, ...]
    grads: tuple[Tensor, Tensor]
    expert_L: Tensor | None

    @classmethod
    def build(cls, shape: Shape, device: torch.device) -> Norm:
        hidden, residual, *grads = (randn(shape, device, "L", "E", seed=seed) for seed in range(4))
        weights = tuple(1 + 0.1 * randn(shape, device, "E", seed=seed) for seed in range(shape.sizes["W"]))
        expert_L = None
        if len(weights) > 1:
            length = shape.sizes["L"]
            expert_L = (torch.arange(length, device=device) >= length // 4).to(torch.int32)
        return cls(hidden, residual, weights, tuple(grads), expert_L)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.hidden_LE, self.residual_LE, *self.weights)

    def functions(self, device: torch.device) -> dict[str, Function]:
        """What is compared: (hidden, residual, *weights) to (normed, sum)."""
        functions: dict[str, Function] = {PLAIN: self.plain()}
        for impl in list_impls(["cpp", "triton"], device):
            functions[impl] = lambda hidden, residual, *weights, impl=impl: mot_norm(
                hidden, weights, EPS, self.expert_L, residual, impl=impl
            )
        if self.expert_L is None:
            functions["torch.nn.functional"] = _functional
            liger = baselines.find_library("liger_kernel.ops.fused_add_rms_norm")
            if liger is not None and device.type == "cuda":
                function = liger.LigerFusedAddRMSNormFunction
                functions["liger"] = lambda hidden, residual, weight: function.apply(
                    hidden, residual, weight, EPS
                )
        return functions

    def plain(self) -> Function:
        """BAGEL's: each expert's tokens are gathered, normed by Qwen2's module, and scattered."""
        if self.expert_L is None:
            return _plain_of_one
        und_L, gen_L = ((self.expert_L == expert).nonzero()[:, 0] for expert in (0, 1))

        def plain(hidden: Tensor, residual: Tensor, und: Tensor, gen: Tensor) -> tuple[Tensor, Tensor]:
            total = residual + hidden
            normed = torch.zeros_like(total)
            normed[und_L] = baselines.plain_rms_norm(total[und_L], und, EPS)
            normed[gen_L] = baselines.plain_rms_norm(total[gen_L], gen, EPS)
            return normed, total

        return plain


def _plain_of_one(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + hidden
    return baselines.plain_rms_norm(total, weight, EPS), total


def _functional(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + hidden
    return torch.nn.functional.rms_norm(total, weight.shape, weight, EPS), total


def build(shape: Shape, device: torch.device) -> Case:
    """The sum and its norm."""
    norm = Norm.build(shape, device)
    runs = {name: lambda f=f: f(*norm.inputs) for name, f in norm.functions(device).items()}
    num_bytes = 2 * count_bytes(norm.hidden_LE, norm.residual_LE) + count_bytes(*norm.weights, norm.expert_L)
    return Case(runs, num_bytes, allow_error(shape))


def build_backward(shape: Shape, device: torch.device) -> Case:
    """The same, and the gradients of hidden states, residual and weights."""
    norm = Norm.build(shape, device)

    def run(function: Function) -> Run:
        return lambda: differentiate(function, norm.inputs, norm.grads)

    def compile_plain(compile_: Compile) -> Run:
        return run(compile_(norm.plain()))

    runs = {name: run(function) for name, function in norm.functions(device).items()}
    # Forward: hidden and residual in, normed and sum out. Backward: two gradients and the sum in, one out.
    num_bytes = 8 * count_bytes(norm.hidden_LE) + 4 * count_bytes(*norm.weights)
    return Case(runs, num_bytes, allow_error(shape), compiled=compile_plain)


OPS = {
    "mot_norm": Op(build, SHAPES, GPU_SHAPES),
    "mot_norm.backward": Op(build_backward, SHAPES, GPU_SHAPES),
}
