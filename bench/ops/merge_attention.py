"""merge_attention: what tokens saw of a prefix, and of the rest.

Log-sum-exps are [H, L] turned around, as backends return them. L tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import PLAIN, Case, Op, Shape, allow_error, count_bytes, list_impls, randn
from realign_kernels import merge_attention

MINI, BAGEL = {"H": 4, "D": 32}, {"H": 28, "D": 128}
SHAPES = [
    Shape({"L": num_tokens} | heads, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for num_tokens, heads in ((32, MINI), (1024, MINI), (256, BAGEL))
]
GPU_SHAPES = [Shape({"L": num_tokens} | BAGEL, torch.bfloat16) for num_tokens in (65536, 4096, 256)]


def plain_merge_attention(
    out_a_LHD: Tensor, lse_a_LH: Tensor, out_b_LHD: Tensor, lse_b_LH: Tensor
) -> tuple[Tensor, Tensor]:
    """The formula, one op of torch at a time."""
    lse_LH = torch.logaddexp(lse_a_LH, lse_b_LH)
    weight_a_LH1, weight_b_LH1 = ((lse - lse_LH).exp()[..., None] for lse in (lse_a_LH, lse_b_LH))
    return (weight_a_LH1 * out_a_LHD + weight_b_LH1 * out_b_LHD).to(out_a_LHD.dtype), lse_LH


def build(shape: Shape, device: torch.device) -> Case:
    """Values and log-sum-exps."""
    outs = [randn(shape, device, "L", "H", "D", seed=seed) for seed in (0, 1)]
    lses = [randn(shape, device, "H", "L", seed=seed).float().T for seed in (2, 3)]
    inputs = (outs[0], lses[0], outs[1], lses[1])
    runs = {PLAIN: lambda: plain_merge_attention(*inputs)}
    for impl in list_impls(["cpp", "triton"], device):
        runs[impl] = lambda impl=impl: merge_attention(*inputs, impl=impl)
    return Case(runs, 3 * count_bytes(outs[0], lses[0]), allow_error(shape))


OPS = {"merge_attention": Op(build, SHAPES, GPU_SHAPES)}
