"""Triton path of `swiglu`, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from realign_kernels.launch import launch
from realign_kernels.swiglu import ops

BLOCK = 2048  # numbers of a program: 16 a thread, two wide loads of each 16-bit tensor


@triton.jit
def load_block(pointer, o_n, m_n):
    """Numbers as float32; 0 where the mask is off."""
    return tl.load(pointer + o_n, mask=m_n, other=0.0).to(tl.float32)


@triton.jit
def swiglu_kernel(p_gate, p_up, p_out, count, BN: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < count
    b_gate = load_block(p_gate, o_n, m_n)
    b_up = load_block(p_up, o_n, m_n)
    # The activation is rounded to the dtype before it weighs, as in the two steps of plain torch.
    b_silu = (b_gate / (1.0 + tl.exp(-b_gate))).to(p_out.dtype.element_ty).to(tl.float32)
    tl.store(p_out + o_n, b_silu * b_up, mask=m_n)


@triton.jit
def swiglu_backward_kernel(p_grad, p_gate, p_up, p_grad_gate, p_grad_up, count, BN: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < count
    b_grad = load_block(p_grad, o_n, m_n)
    b_gate = load_block(p_gate, o_n, m_n)
    b_up = load_block(p_up, o_n, m_n)
    b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
    b_slope = b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    tl.store(p_grad_gate + o_n, b_grad * b_up * b_slope, mask=m_n)
    tl.store(p_grad_up + o_n, b_grad * (b_gate * b_sigmoid), mask=m_n)


def _run(gate: Tensor, up: Tensor) -> Tensor:
    gate, up, out = gate.contiguous(), up.contiguous(), ops.allocate(gate, up)
    launch(swiglu_kernel, (triton.cdiv(gate.numel(), BLOCK),), gate, up, out, gate.numel(), BN=BLOCK)
    return out


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = ops.allocate_backward(grad, gate, up)
    arguments = (grad, gate, up, grad_gate, grad_up, gate.numel())
    launch(swiglu_backward_kernel, (triton.cdiv(gate.numel(), BLOCK),), *arguments, BN=BLOCK)
    return grad_gate, grad_up


swiglu_triton = ops.define("swiglu_triton", _run, _run_backward)
