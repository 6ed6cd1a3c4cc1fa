"""apply_rope: queries or keys turned by given tables."""

from __future__ import annotations

import torch

from bench import baselines
from bench.case import PLAIN, Case, Op, Shape, allow_error, count_bytes, randn
from realign_kernels import apply_rope

SHAPES = [
    Shape({"L": 1024, "H": heads, "D": 128}, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for heads in (4, 28)
]


def build(shape: Shape, device: torch.device) -> Case:
    """Random angles."""
    x_LHD = randn(shape, device, "L", "H", "D")
    angles_LD = torch.rand(shape.sizes["L"], shape.sizes["D"], device=device)
    tables = (angles_LD.cos(), angles_LD.sin())
    runs = {
        PLAIN: lambda: baselines.plain_apply_rope(x_LHD, *tables),
        "reference": lambda: apply_rope(x_LHD, *tables),
    }
    return Case(runs, count_bytes(x_LHD, *tables, x_LHD), allow_error(shape))


OPS = {"apply_rope": Op(build, SHAPES, SHAPES)}
