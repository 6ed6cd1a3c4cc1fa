"""C++ path of `swiglu`, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.swiglu import ops


def _run(gate: Tensor, up: Tensor) -> Tensor:
    out = ops.allocate(gate, up)
    native._C.swiglu({**_inputs(gate, up), "out": out})
    return out


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = grads = ops.allocate_backward(grad, gate, up)
    results = {"grad_gate": grad_gate, "grad_up": grad_up}
    native._C.swiglu_backward({**_inputs(gate, up), "grad": grad, **results})
    return grads


def _inputs(gate: Tensor, up: Tensor) -> dict[str, Any]:
    return {
        "count": gate.numel(),
        "num_threads": torch.get_num_threads(),
        "dtype": native.DTYPE_CODES[gate.dtype],
        "gate": gate,
        "up": up,
    }


swiglu_cpp = ops.define("swiglu", _run, _run_backward)
