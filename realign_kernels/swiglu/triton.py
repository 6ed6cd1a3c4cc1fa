"""Triton path of `swiglu`, forward and backward. L rows, E numbers of a row.

A tile is BL rows by BE columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.launch import launch
from realign_kernels.swiglu import ops

TILE_NUMBERS = 2048  # 16 a thread, two wide loads of each 16-bit tensor
MAX_COLUMNS = 512  # divides BAGEL's width, and leaves little of other widths' last tile empty


@triton.jit
def tile_of(num_rows, width, BL: tl.constexpr, BE: tl.constexpr):
    """Rows, columns and mask of a program's tile."""
    num_tiles = tl.cdiv(width, BE)  # of a row
    i_l, i_e = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    o_l = i_l.to(tl.int64) * BL + tl.arange(0, BL)[:, None]
    o_e = i_e * BE + tl.arange(0, BE)[None, :]
    return o_l, o_e, (o_l < num_rows) & (o_e < width)


@triton.jit
def load_tile(pointer, offsets, mask):
    """Numbers as float32; 0 where the mask is off."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(
    p_gate, p_up, p_out, num_rows, width, stride_gate, stride_up, BL: tl.constexpr, BE: tl.constexpr
):
    o_l, o_e, mask = tile_of(num_rows, width, BL, BE)
    b_gate = load_tile(p_gate, o_l * stride_gate + o_e, mask)
    b_up = load_tile(p_up, o_l * stride_up + o_e, mask)
    # The activation is rounded to the dtype before it weighs, as in the two steps of plain torch.
    b_silu = (b_gate / (1.0 + tl.exp(-b_gate))).to(p_out.dtype.element_ty).to(tl.float32)
    tl.store(p_out + o_l * width + o_e, b_silu * b_up, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_backward_kernel(
    p_grad,
    p_gate,
    p_up,
    p_grad_gate,
    p_grad_up,
    num_rows,
    width,
    stride_gate,
    stride_up,
    stride_grads,
    BL: tl.constexpr,
    BE: tl.constexpr,
):
    o_l, o_e, mask = tile_of(num_rows, width, BL, BE)
    b_grad = load_tile(p_grad, o_l * width + o_e, mask)
    b_gate = load_tile(p_gate, o_l * stride_gate + o_e, mask)
    b_up = load_tile(p_up, o_l * stride_up + o_e, mask)
    b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
    b_slope = b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    tl.store(p_grad_gate + o_l * stride_grads + o_e, b_grad * b_up * b_slope, mask=mask)
    tl.store(p_grad_up + o_l * stride_grads + o_e, b_grad * (b_gate * b_sigmoid), mask=mask)


def find_halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of gate and of up, views of one tensor where that holds both."""
    if up is not None:
        return ops.as_rows(gate), ops.as_rows(up)
    return ops.as_rows(gate).chunk(2, dim=1)


def _launch(kernel, tensors: tuple[Tensor, ...], shape: tuple[int, int], strides: tuple[int, ...]) -> None:
    num_rows, width = shape
    columns = min(MAX_COLUMNS, triton.next_power_of_2(max(width, 1)))
    tile = {"BL": TILE_NUMBERS // columns, "BE": columns}
    grid = (triton.cdiv(num_rows, tile["BL"]) * triton.cdiv(width, columns),)
    launch(kernel, grid, *tensors, num_rows, width, *strides, **tile)


def _run(gate: Tensor, up: Tensor | None) -> Tensor:
    out = ops.allocate(gate, up)
    gate, up = find_halves(gate, up)
    _launch(swiglu_kernel, (gate, up, out), gate.shape, (gate.stride(0), up.stride(0)))
    return out


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    grads = ops.allocate_backward(grad, gate, up)
    grad_gate, grad_up = find_halves(grads[0], None if up is None else grads[1])
    gate, up = find_halves(gate, up)
    tensors = (grad.contiguous(), gate, up, grad_gate, grad_up)
    strides = (gate.stride(0), up.stride(0), grad_gate.stride(0))
    _launch(swiglu_backward_kernel, tensors, gate.shape, strides)
    return grads


swiglu_triton = ops.define("swiglu_triton", _run, _run_backward)
