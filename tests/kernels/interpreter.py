"""Mends Triton's interpreter, for tests.

It keeps bfloat16 as 16-bit integers, widens them correctly, truncates when it narrows, and multiplies
matrices of the integers themselves. Kernels of this package widen before any other arithmetic and narrow once
at a store: rounding there to nearest even, and products of what the integers mean, are all that is missing.
A number of a product has the same bits wherever in a tile it stands, as on the chip, and not as in the BLAS.
Triton 3.6 also needs help where a number bounds a loop, with NumPy from 2.4 on.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import numpy as np
import torch


@cache
def install_bfloat16() -> None:
    """Replace the interpreter's casts between float32 and bfloat16, its products of floats, its indexes."""
    from triton.runtime import interpreter

    _mend_casts(interpreter)
    _mend_products(interpreter)
    _mend_indexes(interpreter)


def _mend_casts(interpreter: ModuleType) -> None:
    import triton.language as tl

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_as_torch_does(self, source, target):
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.float32, tl.bfloat16):
            wide = torch.from_numpy(np.ascontiguousarray(source.data))
            bits = wide.to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, target.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widen(source.data), target.scalar)
        return cast(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast_as_torch_does


def _mend_products(interpreter: ModuleType) -> None:
    import triton.language as tl

    multiply = interpreter.InterpreterBuilder.create_dot

    def multiply_wide(self, a, b, total, *options):
        if not a.dtype.scalar.is_floating() or a.dtype.scalar.primitive_bitwidth == 8:
            return multiply(self, a, b, total, *options)
        sides = (side.data if side.dtype.scalar != tl.bfloat16 else _widen(side.data) for side in (a, b))
        a_NK, b_KM = (side.astype(np.float32) for side in sides)
        products_NM = (a_NK[:, None, :] * b_KM.T[None, :, :]).sum(axis=-1)
        return interpreter.TensorHandle(products_NM + total.data, total.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = multiply_wide


def _mend_indexes(interpreter: ModuleType) -> None:
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index


def _widen(bits: np.ndarray) -> np.ndarray:
    """float32 of the bits of bfloat16."""
    return torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16).to(torch.float32).numpy()
