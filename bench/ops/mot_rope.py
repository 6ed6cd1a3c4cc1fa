"""mot_rope: norm and turn of queries and keys, put in packed order; with a backward, all gradients.

The tokens lie in the order of two experts, a quarter the first's; in packed order these are every fourth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import baselines
from bench.case import PLAIN, Case, Compile, Op, Run, Shape, allow_error, count_bytes, list_impls, randn
from bench.gradients import differentiate
from realign_kernels import QKNorm, RopeTable, mot_rope

EPS, THETA = 1e-6, 1e6
MINI, BAGEL = {"H": 4, "K": 2, "D": 32}, {"H": 28, "K": 4, "D": 128}
SHAPES = [
    Shape({"L": length} | heads, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for length, heads in ((1024, MINI), (256, BAGEL))
]
GPU_SHAPES = [Shape({"L": length} | BAGEL, torch.bfloat16) for length in (65536, 4096, 1024)]
Function = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Heads:
    """Queries, keys, norm weights, angles, and where the tokens go."""

    query_LHD: Tensor
    key_LKD: Tensor
    weights: tuple[Tensor, ...]  # queries' of both experts, keys' of both
    grads: tuple[Tensor, Tensor]
    rope: RopeTable
    expert_L: Tensor
    out_index_L: Tensor

    @classmethod
    def build(cls, shape: Shape, device: torch.device) -> Heads:
        query, grad_query = (randn(shape, device, "L", "H", "D", seed=seed) for seed in (0, 1))
        key, grad_key = (randn(shape, device, "L", "K", "D", seed=seed) for seed in (2, 3))
        weights = tuple(1 + 0.1 * randn(shape, device, "D", seed=seed) for seed in range(4))
        packed_L = torch.arange(shape.sizes["L"], device=device)
        index_L = torch.cat((packed_L[::4], packed_L[packed_L % 4 != 0]))
        expert_L = (index_L % 4 != 0).to(torch.int32)
        rope = RopeTable.build(index_L, shape.sizes["D"], THETA)
        return cls(query, key, weights, (grad_query, grad_key), rope, expert_L, index_L)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.query_LHD, self.key_LKD, *self.weights)

    def functions(self, device: torch.device) -> dict[str, Function]:
        """What is compared: (query, key, *weights) to (query, key) in packed order."""
        functions: dict[str, Function] = {PLAIN: self.plain()}
        for impl in list_impls(["cpp", "triton"], device):
            functions[impl] = lambda query, key, *weights, impl=impl: mot_rope(
                query,
                key,
                self.rope,
                QKNorm(weights[:2], weights[2:], EPS),
                self.expert_L,
                self.out_index_L,
                impl=impl,
            )
        return functions

    def plain(self) -> Function:
        """BAGEL's: each expert's heads are scattered to packed order and normed there in float32."""
        und_L, gen_L = (self.out_index_L[self.expert_L == expert] for expert in (0, 1))
        cos_LD, sin_LD = (
            torch.empty(len(table), 2, table.shape[1], device=table.device)
            .index_copy_(0, self.out_index_L, table[:, None].repeat(1, 2, 1))
            .flatten(1)
            for table in (self.rope.cos_LA, self.rope.sin_LA)
        )

        def place(heads: Tensor, und: Tensor, gen: Tensor) -> Tensor:
            packed, normed = torch.zeros_like(heads), torch.zeros(heads.shape, device=heads.device)
            packed[und_L], packed[gen_L] = heads[: len(und_L)], heads[len(und_L) :]
            packed = packed.to(torch.float32)
            normed[und_L] = baselines.plain_rms_norm(packed[und_L], und, EPS)
            normed[gen_L] = baselines.plain_rms_norm(packed[gen_L], gen, EPS)
            return baselines.plain_apply_rope(normed, cos_LD, sin_LD).to(heads.dtype)

        return lambda query, key, *weights: (place(query, *weights[:2]), place(key, *weights[2:]))


def build(shape: Shape, device: torch.device) -> Case:
    """Queries and keys."""
    heads = Heads.build(shape, device)
    runs = {name: lambda f=f: f(*heads.inputs) for name, f in heads.functions(device).items()}
    tables = (heads.rope.cos_LA, heads.rope.sin_LA, heads.expert_L, heads.out_index_L)
    num_bytes = 2 * count_bytes(heads.query_LHD, heads.key_LKD) + count_bytes(*heads.weights, *tables)
    return Case(runs, num_bytes, allow_error(shape))


def build_backward(shape: Shape, device: torch.device) -> Case:
    """The same, and the gradients of queries, keys and weights."""
    heads = Heads.build(shape, device)

    def run(function: Function) -> Run:
        return lambda: differentiate(function, heads.inputs, heads.grads)

    def compile_plain(compile_: Compile) -> Run:
        return run(compile_(heads.plain()))

    runs = {name: run(function) for name, function in heads.functions(device).items()}
    # Forward: heads in and out. Backward: gradients and heads in, gradients out. Tables both times.
    tables = (heads.rope.cos_LA, heads.rope.sin_LA, heads.expert_L, heads.out_index_L)
    num_bytes = 5 * count_bytes(heads.query_LHD, heads.key_LKD) + 2 * count_bytes(*tables)
    return Case(runs, num_bytes, allow_error(shape), compiled=compile_plain)


OPS = {
    "mot_rope": Op(build, SHAPES, GPU_SHAPES),
    "mot_rope.backward": Op(build_backward, SHAPES, GPU_SHAPES),
}
