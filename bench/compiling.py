"""Compiles kernels ahead of time, for chips that need not be there, and reads back what they take.

Triton's kernels are compiled from recorded launches, exactly as at the launch: the JIT itself is asked for
types, constants and alignments. The CUDA files go through nvcc with the flags of the build.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine_code import Usage, Widths, count_ptx, read_usage, read_warps, read_widths
from csrc.nvcc import NOT_FOUND, NVCC_FLAGS, find_nvcc
from realign_kernels.launch import Launch


@dataclass(frozen=True)
class Specialised:
    """A launch as Triton's JIT would compile it: its choice of types, constants, alignments and options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]

    def describe(self) -> str:
        """What tells one configuration of a kernel from another: dtypes and constants by name.

        A `!` follows a pointer or number that is not known to be divisible by 16.
        """
        words = []
        for index, (name, dtype) in enumerate(self.signature.items()):
            if dtype == "constexpr":
                words.append(f"{name}={self.constants[(index,)]}")
            else:
                is_free = dtype.startswith(("*", "i")) and not self.attributes.get((index,))
                words.append(f"{name}:{dtype}{'!' if is_free else ''}")
        return " ".join(words)


def specialise(recorded: Launch, capability: int) -> Specialised:
    """Ask the JIT what it would make of a launch on a chip of this capability (80, 90)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel = recorded.kernel
    backend = make_backend(GPUTarget("cuda", capability, 32))
    options = {
        "num_warps": recorded.num_warps,
        "num_stages": recorded.num_stages,
        "enable_fp_fusion": False,
    }
    keywords = {**recorded.constants, **options}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, choices, rest = bind(*recorded.arguments, **keywords)
    parsed, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, choices, rest)
    return Specialised(kernel, signature, constants, attributes, parsed.__dict__)


def compile_triton(chosen: Specialised, capability: int) -> tuple[Usage, Widths]:
    """Compile down to machine code; the shared memory is what the launch would ask for."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = triton.compiler.ASTSource(chosen.kernel, chosen.signature, chosen.constants, chosen.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=chosen.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = read_usage(Path(file.name))[compiled.metadata.name]
    return Usage(usage.registers, usage.stack_bytes, compiled.metadata.shared), count_ptx(compiled.asm["ptx"])


MAX_WARPS = 32  # of a block


def compile_cuda(source: Path, capability: int) -> dict[tuple[str, str], tuple[int, Usage, Widths]]:
    """Compile a CUDA file; warps of a block and what they take, by name and template arguments.

    Raises: FileNotFoundError without nvcc.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError(NOT_FOUND)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, *NVCC_FLAGS, "-cubin", f"-arch=sm_{capability}", "-o", cubin, source]
        subprocess.run(command, check=True)
        usage, widths, warps = read_usage(cubin), read_widths(cubin), read_warps(cubin)
    return {
        name: (warps.get(code, MAX_WARPS), usage[code], widths[code])
        for code, name in _demangle(list(usage)).items()
    }


def _demangle(codes: list[str]) -> dict[str, tuple[str, str]]:
    """Name and template arguments as in the source, where the machine has c++filt; else the linker's."""
    tool = shutil.which("c++filt")
    if tool is None or not codes:
        return {code: (code, "") for code in codes}
    command = [tool, "--no-params", *codes]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    parts = (line.partition("<") for line in shown)
    names = ((name.rpartition("::")[2], arguments.removesuffix(">")) for name, _, arguments in parts)
    return dict(zip(codes, names, strict=True))
