"""C++ path of `decode_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.decode_attention import ops


def _run(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    query, key, value, length = arguments.values()
    query = ops.in_place(query)
    out, lse = results = ops.allocate(query)
    native._C.decode_attention(
        {
            "query_shape": query.shape,
            "query_stride": query.stride(),
            "key_shape": key.shape,
            "key_stride": key.stride(),
            "value_stride": value.stride(),
            "num_threads": torch.get_num_threads(),
            "has_long_lengths": length.dtype == torch.int64,
            "dtype": native.DTYPE_CODES[query.dtype],
            "query": query,
            "key": key,
            "value": value,
            "length": length,
            "out": out,
            "lse": lse,
        }
    )
    return results


decode_attention_cpp = native.CPUOp(
    "decode_attention", ops.ARGUMENTS, ops.RESULTS, _run, lambda arguments: ops.allocate(arguments["query"])
)
