"""C++ path of `merge_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.merge_attention import ops


def _run(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    out_a = arguments["out_a"]
    out, lse = results = ops.allocate(out_a)
    strides = {f"{name}_stride": tensor.stride() for name, tensor in arguments.items()}
    native._C.merge_attention(
        {
            **arguments,
            **strides,
            "shape": out_a.shape,
            "num_threads": torch.get_num_threads(),
            "dtype": native.DTYPE_CODES[out_a.dtype],
            "out": out,
            "lse": lse,
        }
    )
    return results


merge_attention_cpp = native.CPUOp(
    "merge_attention", ops.ARGUMENTS, ops.RESULTS, _run, lambda arguments: ops.allocate(arguments["out_a"])
)
