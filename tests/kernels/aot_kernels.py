"""Kernels whose compilation has known results: `python -m tests.kernels.aot_kernels` prints them as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product

import torch
import triton
import triton.language as tl

from bench.compiling import compile_triton, specialise
from realign_kernels import Guidance, StepCoefficients, guided_flow_step
from realign_kernels.launch import launch, record_launches


@triton.jit
def scale_kernel(p_x, p_bias, p_out, factor, size, stride, BL: tl.constexpr):
    o_x = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    mask = o_x < size
    x = tl.load(p_x + o_x * stride, mask=mask).to(tl.float32) * factor
    if p_bias is not None:
        x += tl.load(p_bias + o_x, mask=mask).to(tl.float32)
    tl.store(p_out + o_x, x, mask=mask)


@triton.jit
def centre_kernel(p_x, p_out, BL: tl.constexpr):
    """Holds all numbers while it sums them: too many for the registers, if they are BL / 32 a thread."""
    o_x = tl.arange(0, BL)
    x = tl.load(p_x + o_x)
    tl.store(p_out + o_x, x - tl.sum(x))


def compile_case(kernel, *arguments, capability: int = 90, **constants) -> dict:
    """What `kernel` was specialised to, and what it takes."""
    with record_launches() as launches:
        launch(kernel, (1,), *arguments, **constants)
    chosen = specialise(launches[0], capability)
    usage, widths = compile_triton(chosen, capability)
    return {"configuration": chosen.describe(), **asdict(usage), **asdict(widths)}


def count_configurations(batches: range, lengths: tuple[int, ...]) -> dict[str, int]:
    """Of each kernel of a guided step, over these numbers of samples, and of tokens of each of them."""
    found: dict[str, set[str]] = {}
    for batch, length in product(batches, lengths):
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
        sample_LC, ones_B = torch.zeros(batch * length, 64), torch.ones(batch)
        step = (Guidance(ones_B), StepCoefficients(ones_B, ones_B))
        with record_launches() as launches:
            guided_flow_step(sample_LC, [sample_LC] * 2, cu_seqlens, *step, impl="triton")
        for one in launches:
            found.setdefault(one.kernel.__name__, set()).add(specialise(one, 90).describe())
    return {name: len(configurations) for name, configurations in found.items()}


def compile_cases() -> dict[str, dict]:
    """Each case by name."""
    x, half = torch.zeros(4096), torch.zeros(4096, dtype=torch.bfloat16)
    big = 1 << 40
    return {
        "aligned": compile_case(scale_kernel, x, None, x, 0.5, 4096, 1, BL=1024),
        "ampere": compile_case(scale_kernel, x, None, x, 0.5, 4096, 1, BL=1024, capability=80),
        "half": compile_case(scale_kernel, half, half, x, 0.5, 4096, 1, BL=1024),
        "shifted": compile_case(scale_kernel, x[1:], None, x, 0.5, 4095, 1, BL=1024),
        "strided": compile_case(scale_kernel, x, None, x, 0.5, big, 2, BL=1024),
        "summed": compile_case(centre_kernel, x, x, BL=1024),
        "batches": count_configurations(range(9, 17), (30, 32)),
        "spilled": compile_case(centre_kernel, x, x, BL=16384, num_warps=1),
    }


if __name__ == "__main__":
    print(json.dumps(compile_cases()))
