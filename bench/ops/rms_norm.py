"""rms_norm: the norm of an expert's hidden states."""

from __future__ import annotations

import torch

from bench import baselines
from bench.case import PLAIN, Case, Op, Shape, allow_error, count_bytes, randn
from realign_kernels import rms_norm

SHAPES = [
    Shape({"L": 1024, "E": width}, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for width in (128, 3584)
]


def build(shape: Shape, device: torch.device) -> Case:
    """One weight for all tokens."""
    x_LE = randn(shape, device, "L", "E")
    weight_E = torch.ones(shape.sizes["E"], dtype=shape.dtype, device=device)
    runs = {
        PLAIN: lambda: baselines.plain_rms_norm(x_LE, weight_E, 1e-6),
        "torch.nn.functional": lambda: torch.nn.functional.rms_norm(x_LE, weight_E.shape, weight_E, 1e-6),
        "reference": lambda: rms_norm(x_LE, weight_E, 1e-6),
    }
    return Case(runs, count_bytes(x_LE, weight_E, x_LE), allow_error(shape))


OPS = {"rms_norm": Op(build, SHAPES, SHAPES)}
