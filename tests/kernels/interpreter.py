"""Makes Triton's interpreter right about bfloat16, for tests.

It keeps bfloat16 as 16-bit integers, widens them correctly, and truncates when it narrows. Kernels of this
package widen before any arithmetic and narrow once at a store: rounding there to nearest even, as the chip
does, is all that is missing.
"""

from __future__ import annotations

import numpy as np
import torch


def install_bfloat16() -> None:
    """Replace the interpreter's cast between float32 and bfloat16 by torch's."""
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_as_torch_does(self, source, target):
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.float32, tl.bfloat16):
            wide = torch.from_numpy(np.ascontiguousarray(source.data))
            bits = wide.to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, target.scalar)
        if pair == (tl.bfloat16, tl.float32):
            bits = torch.from_numpy(np.ascontiguousarray(source.data)).view(torch.bfloat16)
            return interpreter.TensorHandle(bits.to(torch.float32).numpy(), target.scalar)
        return cast(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast_as_torch_does
