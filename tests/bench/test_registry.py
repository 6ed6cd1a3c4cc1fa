"""Every entry builds, and its runs give the same numbers: Triton in its interpreter, without a GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import measure
from bench.case import OURS, PLAIN, Shape
from bench.gate import keep_right_runs
from bench.registry import OPS

CPU = torch.device("cpu")
CASES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, op in OPS.items()
    for dtype in dict.fromkeys(shape.dtype for shape in (*op.shapes, *op.gpu_shapes))
]


def shrink(op: str, dtype: torch.dtype) -> Shape:
    """The smallest shape of an op in a dtype, with fewer samples and tokens, which no op has a rule for."""
    shapes = [shape for shape in (*OPS[op].shapes, *OPS[op].gpu_shapes) if shape.dtype == dtype]
    smallest = min(shapes, key=lambda shape: math.prod(shape.sizes.values()))
    few = {"B": 2, "L": 5}
    return replace(
        smallest, sizes={name: min(size, few.get(name, size)) for name, size in smallest.sizes.items()}
    )


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_every_case_passes_its_gate(op, dtype):
    case = OPS[op].build(shrink(op, dtype), CPU)
    assert case.num_bytes > 0
    assert set(case.runs) & set(OURS)
    right, notes = keep_right_runs(case)
    assert list(right) == list(case.runs), notes


@pytest.mark.parametrize("op", list(OPS))
def test_shapes_of_an_op_have_the_same_names_and_come_once(op):
    for shapes in (OPS[op].shapes, OPS[op].gpu_shapes):
        assert shapes
        assert len({(str(shape), shape.dtype) for shape in shapes}) == len(shapes)
        assert len({tuple(shape.sizes) for shape in shapes}) == 1


@pytest.mark.parametrize("op", list(OPS))
def test_the_compiled_baseline_is_one_graph_for_all_sets_of_inputs(op, monkeypatch):
    graphs = []

    def count_graphs(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(measure.torch, "compile", partial(torch.compile, backend=count_graphs))
    torch.compiler.reset()
    shape = shrink(op, OPS[op].shapes[0].dtype)
    cases = [measure.add_compiled(OPS[op].build(shape, CPU)) for _ in range(3)]
    with torch.no_grad():
        for case in cases:
            case.runs[measure.COMPILED]()
    assert len(graphs) == 1
    case = replace(cases[0], runs={name: cases[0].runs[name] for name in (PLAIN, measure.COMPILED)})
    assert list(keep_right_runs(case)[0]) == [PLAIN, measure.COMPILED]


def test_bytes_are_those_of_each_tensor_once():
    shape = Shape({"B": 2, "L": 5, "C": 6}, torch.bfloat16)
    # Sample read and written in float32, three velocities read in bfloat16.
    assert OPS["guided_flow_step"].build(shape, CPU).num_bytes == 2 * 5 * 6 * (4 + 4 + 3 * 2)
