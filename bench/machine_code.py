"""What a compiled kernel takes: registers, stack, shared memory, and how wide its loads and stores are.

Read from the machine code itself by NVIDIA's `cuobjdump`, of which Triton's package has one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_USAGE = re.compile(r"Function ([^\n]+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SECTION = re.compile(r"^\.nv\.info\.(\S+)", re.MULTILINE)
_MAX_THREADS = re.compile(r"EIATTR_MAX_THREADS\s+Format:\s+EIFMT_SVAL\s+Value:\s+0x([0-9a-f]+)")
_SASS_FUNCTION = re.compile(r"Function : (\S+)")
_SASS_ACCESS = re.compile(r"\b(LDG|LDGSTS|STG)((?:\.\w+)*)")
_PTX_ACCESS = re.compile(r"\b(ld|st)\.global((?:[.:]{1,2}\w+)*)")
_PTX_COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\s*[,;]")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes: registers and stack per thread (spills, or arrays), shared memory per block."""

    registers: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Widths:
    """How many load and store instructions on global memory there are of each width in bytes."""

    loads: dict[int, int]
    stores: dict[int, int]


def find_tool(name: str) -> Path | None:
    """A tool of CUDA: that of Triton's package, else that on PATH, else None."""
    spec = find_spec("triton")
    bundled = (
        [Path(folder, "backends/nvidia/bin", name) for folder in spec.submodule_search_locations or ()]
        if spec
        else []
    )
    on_path = shutil.which(name)
    candidates = bundled + ([Path(on_path)] if on_path else [])
    return next((path for path in candidates if path.is_file()), None)


def read_usage(cubin: Path) -> dict[str, Usage]:
    """What each kernel of a cubin takes. Shared memory is the static part; a launch may add to it."""
    return {
        name: Usage(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in _USAGE.findall(_run("--dump-resource-usage", cubin))
    }


def read_widths(cubin: Path) -> dict[str, Widths]:
    """Widths of the accesses of each kernel of a cubin, from its machine code."""
    parts = _SASS_FUNCTION.split(_run("-sass", cubin))
    return {name: _count_sass(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def read_warps(cubin: Path) -> dict[str, int]:
    """Warps of a block of each kernel of a cubin, if its launch bounds say so."""
    parts = _SECTION.split(_run("--dump-elf", cubin))
    found = {name: _MAX_THREADS.search(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    return {name: int(match[1], 16) // 32 for name, match in found.items() if match}


def _run(option: str, cubin: Path) -> str:
    tool = find_tool("cuobjdump")
    if tool is None:
        raise FileNotFoundError("no cuobjdump: pip install triton, or put CUDA's on PATH")
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


def _count_sass(text: str) -> Widths:
    counts = {"LDG": Counter(), "STG": Counter()}
    for operation, modifiers in _SASS_ACCESS.findall(text):
        words = modifiers.split(".")
        widths = [int(word) // 8 for word in words if word in ("64", "128")]
        widths += [1 for word in words if word in ("U8", "S8")] + [
            2 for word in words if word in ("U16", "S16")
        ]
        counts["STG" if operation == "STG" else "LDG"][widths[0] if widths else 4] += 1
    return Widths(dict(counts["LDG"]), dict(counts["STG"]))


def count_ptx(ptx: str) -> Widths:
    """Widths of the accesses of a kernel, from its PTX; asynchronous copies count as loads."""
    counts = {"ld": Counter(), "st": Counter()}
    for operation, modifiers in _PTX_ACCESS.findall(ptx):
        words = re.split(r"[.:]+", modifiers)
        lanes = next((int(word[1:]) for word in words if re.fullmatch(r"v\d", word)), 1)
        bits = next(int(word[1:]) for word in reversed(words) if re.fullmatch(r"[busf]\d+", word))
        counts[operation][lanes * bits // 8] += 1
    for size in _PTX_COPY.findall(ptx):
        counts["ld"][int(size, 0)] += 1
    return Widths(dict(counts["ld"]), dict(counts["st"]))
