"""C++ path of `mot_norm`, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from realign_kernels import native
from realign_kernels.mot_norm import ops


def _run(
    hidden: Tensor,
    residual: Tensor | None,
    und: Tensor,
    gen: Tensor | None,
    expert: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    normed, total, scale = results = ops.allocate(hidden, residual, und, gen, expert, eps)
    arguments = _common(normed, und, gen, expert)
    arguments["eps"], arguments["normed"], arguments["scale"] = eps, normed, scale
    arguments["hidden"], arguments["hidden_dtype"] = hidden, native.DTYPE_CODES[hidden.dtype]
    if residual is not None:
        arguments["residual"], arguments["residual_dtype"] = residual, native.DTYPE_CODES[residual.dtype]
        arguments["total"] = total
    native._C.mot_norm(arguments)
    return results


def _run_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    scale: Tensor,
    und: Tensor,
    gen: Tensor | None,
    expert: Tensor | None,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weights = results = ops.allocate_backward(
        grad_normed, grad_total, x, scale, und, gen, expert
    )
    arguments = {"grad_normed": grad_normed, "grad_total": grad_total, "x": x, "scale": scale}
    arguments |= {"grad_x": grad_x, "grad_weights": grad_weights}
    native._C.mot_norm_backward(arguments | _common(x, und, gen, expert))
    return results


def _common(x: Tensor, und: Tensor, gen: Tensor | None, expert: Tensor | None) -> dict[str, Any]:
    """What both passes take."""
    return {
        "num_rows": x.shape[0],
        "width": x.shape[1],
        "num_threads": torch.get_num_threads(),
        "dtype": native.DTYPE_CODES[x.dtype],
        "und": _round(und, x.dtype),
        "gen": None if gen is None else _round(gen, x.dtype),
        "expert": expert,
    }


def _round(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 numbers that `dtype` can hold."""
    return weight if weight.dtype == dtype == torch.float32 else weight.to(dtype).float()


mot_norm_cpp = ops.define("mot_norm", _run, _run_backward)
