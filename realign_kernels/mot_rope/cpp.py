"""C++ path of `mot_rope`, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.mot_rope import ops
from realign_kernels.mot_rope.ops import Inputs


def _run(inputs: Inputs, eps: float) -> tuple[Tensor, Tensor]:
    query, key = results = ops.allocate(inputs.query, inputs.key)
    native._C.mot_rope(_inputs(inputs, eps) | {"query_out": query} | _key_out(key))
    return results


def _run_cached(inputs: Inputs, eps: float, slots: Tensor, slot: Tensor) -> Tensor:
    query, _ = ops.allocate(inputs.query, inputs.key)
    if slot.numel():
        native._C.mot_rope(_inputs(inputs, eps) | {"query_out": query, "slot": slot} | _key_out(slots))
    return query


def _run_backward(inputs: Inputs, grads: tuple[Tensor, Tensor], eps: float) -> tuple[Tensor, ...]:
    query, key, weights = results = ops.allocate_backward(*grads, *inputs, eps)
    outs = {"query_out": query, "key_out": key, "grad_weights": weights}
    native._C.mot_rope_backward(
        _inputs(inputs, eps) | dict(zip(("grad_query", "grad_key"), grads, strict=True)) | outs
    )
    return results


def _key_out(key: Tensor) -> dict[str, Any]:
    stride, head_stride, _ = key.stride()
    return {"key_out": key, "key_out_stride": stride, "key_out_head_stride": head_stride}


def _inputs(inputs: Inputs, eps: float) -> dict[str, Any]:
    query, key = ops.as_rows(inputs.query), ops.as_rows(inputs.key)
    num_tokens, num_query_heads, dim = query.shape
    arguments = {
        "num_tokens": num_tokens,
        "dim": dim,
        "num_query_heads": num_query_heads,
        "num_key_heads": key.shape[1],
        "query_stride": query.stride(0),
        "key_stride": key.stride(0),
        "num_threads": torch.get_num_threads(),
        "eps": eps,
        "dtype": native.DTYPE_CODES[query.dtype],
        "query": query,
        "key": key,
        "expert": inputs.expert,
        "index": inputs.index,
    }
    for name, tensor in zip(Inputs._fields[2:8], inputs[2:8], strict=True):  # tables and weights
        if tensor is not None:
            arguments[name] = tensor.float()
    return arguments


mot_rope_cpp = ops.define("mot_rope", _run, _run_backward)
mot_rope_cached_cpp = ops.define_cached("mot_rope_cached", _run_cached)
