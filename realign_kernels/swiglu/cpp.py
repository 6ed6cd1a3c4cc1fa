"""C++ path of `swiglu`, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.swiglu import ops


def _run(gate: Tensor, up: Tensor | None) -> Tensor:
    out = ops.allocate(gate, up)
    native._C.swiglu({**_inputs(gate, up), "out": out})
    return out


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = grads = ops.allocate_backward(grad, gate, up)
    results = {"grad_gate": grad_gate, "grad_up": None if up is None else grad_up}
    native._C.swiglu_backward({**_inputs(gate, up), "grad": grad, **results})
    return grads


def _inputs(gate: Tensor, up: Tensor | None) -> dict[str, Any]:
    gate = ops.as_rows(gate)
    num_rows, width = gate.shape
    arguments = {
        "num_rows": num_rows,
        "width": width if up is not None else width // 2,
        "gate_stride": gate.stride(0),
        "num_threads": torch.get_num_threads(),
        "dtype": native.DTYPE_CODES[gate.dtype],
        "gate": gate,
    }
    if up is not None:
        arguments["up"] = up = ops.as_rows(up)
        arguments["up_stride"] = up.stride(0)
    return arguments


swiglu_cpp = ops.define("swiglu", _run, _run_backward)
