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
    num_heads, dim = key.shape[1:]
    strides = {"key_row_stride": num_heads * dim, "key_head_stride": dim}
    native._C.mot_rope(_inputs(inputs, eps) | strides | {"query_out": query, "key_out": key})
    return results


def _run_cached(inputs: Inputs, eps: float, slots: Tensor, slot: Tensor) -> Tensor:
    query, _ = ops.allocate(inputs.query, inputs.key)
    if slot.numel():
        strides = {"key_row_stride": slots.stride(0), "key_head_stride": slots.stride(1)}
        start = slots.as_strided(
            (1,), (1,)
        )  # an array that needs no copy to be contiguous, at the same address
        cache = {"key_out": start, "slot": slot} | strides
        native._C.mot_rope(_inputs(inputs, eps) | cache | {"query_out": query})
    return query


def _run_backward(inputs: Inputs, grads: tuple[Tensor, Tensor], eps: float) -> tuple[Tensor, ...]:
    query, key, weights = results = ops.allocate_backward(*grads, *inputs, eps)
    outs = {"query_out": query, "key_out": key, "grad_weights": weights}
    native._C.mot_rope_backward(
        _inputs(inputs, eps) | dict(zip(("grad_query", "grad_key"), grads, strict=True)) | outs
    )
    return results


def _inputs(inputs: Inputs, eps: float) -> dict[str, Any]:
    arguments = inputs._asdict()
    for name in ("cos", "sin", "und_query", "gen_query", "und_key", "gen_key"):
        if arguments[name] is not None:
            arguments[name] = arguments[name].float()
    num_tokens, num_query_heads, dim = inputs.query.shape
    return arguments | {
        "num_tokens": num_tokens,
        "dim": dim,
        "num_query_heads": num_query_heads,
        "num_key_heads": inputs.key.shape[1],
        "num_threads": torch.get_num_threads(),
        "eps": eps,
        "dtype": native.DTYPE_CODES[inputs.query.dtype],
    }


mot_rope_cpp = ops.define("mot_rope", _run, _run_backward)
mot_rope_cached_cpp = ops.define_cached("mot_rope_cached", _run_cached)
