"""swiglu: the MLP's gate."""

from __future__ import annotations

import torch

from bench import baselines
from bench.case import PLAIN, Case, Op, Shape, allow_error, count_bytes, randn
from realign_kernels import swiglu

SHAPES = [
    Shape({"L": 1024, "E": width}, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for width in (128, 3584)
]


def build(shape: Shape, device: torch.device) -> Case:
    """Gate and up of the width of the shape."""
    gate_LE, up_LE = (randn(shape, device, "L", "E", seed=seed) for seed in (0, 1))
    runs = {
        PLAIN: lambda: baselines.plain_swiglu(gate_LE, up_LE),
        "reference": lambda: swiglu(gate_LE, up_LE),
    }
    return Case(runs, count_bytes(gate_LE, up_LE, gate_LE), allow_error(shape))


OPS = {"swiglu": Op(build, SHAPES, SHAPES)}
