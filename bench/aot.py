"""`python -m bench.aot`: compile every kernel for sm_80 and sm_90, no GPU needed, and say what each takes.

A row in `results/aot.jsonl` per kernel and configuration: registers, stack (spills are there), shared memory,
widths of loads and stores. Triton's launches are recorded from the bench entries and `bench.variants`, with
tensors on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.overrides import TorchFunctionMode

from bench.case import Op, Shape
from bench.compiling import compile_cuda, compile_triton, specialise
from bench.machine_code import find_tool
from bench.registry import OPS
from bench.rows import RESULTS as FOLDER
from bench.rows import name_commit
from bench.variants import VARIANTS
from csrc.nvcc import CAPABILITIES, NOT_FOUND, find_nvcc
from realign_kernels import launch

ROOT = Path(__file__).parents[1]
RESULTS = FOLDER / "aot.jsonl"
FEW = 1024
COLUMNS = (
    "op",
    "kernel",
    "chip",
    "configurations",
    "warps",
    "registers",
    "stack",
    "shared",
    "loads",
    "stores",
)


@dataclass(frozen=True)
class KernelResources:
    """One compiled kernel, as it stands in `results/aot.jsonl`.

    Attributes:
        configuration: see `Specialised.describe`; of a CUDA kernel, its template arguments.
        capability: ten times the compute capability: 80, 90.
        num_warps: of a Triton kernel; 0 for CUDA, where a launch says.
        is_timed: whether a bench entry runs this configuration; of CUDA kernels always.
        registers: per thread.
        stack_bytes: per thread; not 0 means spilled registers, or arrays outside registers.
        shared_bytes: per block, without what the launch of a CUDA kernel adds.
        loads, stores: number of instructions on global memory by their width in bytes.
    """

    op: str
    language: str
    kernel: str
    configuration: str
    capability: int
    num_warps: int
    is_timed: bool
    registers: int
    stack_bytes: int
    shared_bytes: int
    loads: dict[int, int]
    stores: dict[int, int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 if a kernel spills."""
    options = build_parser().parse_args(arguments)
    if launch.is_interpreting():
        raise SystemExit("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what is reported was compiled now
        rows = compile_all(options.op or list(OPS), options.capability)
    print_table(rows)
    out = options.out or (None if options.op else RESULTS)
    if out is not None:
        write_rows(rows, out)
        print(f"{len(rows)} rows written to {out}")
    spilled = [row for row in rows if row.stack_bytes]
    for row in spilled:
        print(f"{row.kernel} on sm_{row.capability} spills {row.stack_bytes} bytes: {row.configuration}")
    return int(bool(spilled))


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m bench.aot`."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--op", action="append", choices=list(OPS), help="this op only; may be repeated")
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES), help="80 90")
    help_out = f"file the rows go to ({RESULTS.name}, if all ops are compiled)"
    parser.add_argument("--out", type=Path, help=help_out)
    return parser


def compile_all(ops: Sequence[str], capabilities: Sequence[int]) -> list[KernelResources]:
    """Rows of the Triton kernels of these ops, then of the CUDA files of the same names, where nvcc is."""
    sources = [path for path in sorted(ROOT.glob("csrc/*.cu")) if path.stem in ops]
    if sources and find_nvcc() is None:
        print(f"NOTICE: {len(sources)} CUDA files are left out: {NOT_FOUND}")
        sources = []
    # Processes of their own start without this one's threads.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        parts = [pool.submit(compile_op, name, capabilities) for name in ops]
        parts += [pool.submit(compile_source, source, capabilities) for source in sources]
        return [row for part in parts for row in part.result()]


def compile_source(source: Path, capabilities: Sequence[int]) -> list[KernelResources]:
    """One row per kernel of a CUDA file and chip."""
    return [
        build_row(source.stem, "cuda", *name, capability, 0, True, *resources)
        for capability in capabilities
        for name, resources in compile_cuda(source, capability).items()
    ]


def compile_op(name: str, capabilities: Sequence[int]) -> list[KernelResources]:
    """One row per distinct configuration of the op's Triton kernels and chip."""
    rows: dict[tuple, KernelResources] = {}
    for is_timed, recorded in record_launches(name):
        for capability in capabilities:
            chosen = specialise(recorded, capability)
            label = (chosen.kernel.__name__, chosen.describe(), capability, recorded.num_warps)
            if label not in rows:
                rows[label] = build_row(name, "triton", *label, is_timed, *compile_triton(chosen, capability))
    return list(rows.values())


def record_launches(name: str) -> Iterator[tuple[bool, launch.Launch]]:
    """The launches of an op's Triton run at each shape (True) and of its variants (False), if it has any."""
    for shape in pick_shapes(OPS[name]):
        with launch.record_launches() as launches, torch.no_grad(), NoRandomNumbers():
            run = OPS[name].build(shape, torch.device("cpu")).runs.get("triton")
            if run is not None:
                run()
        yield from ((True, recorded) for recorded in launches)
    with launch.record_launches() as launches, torch.no_grad():
        VARIANTS.get(name, lambda: None)()
    yield from ((False, recorded) for recorded in launches)


def pick_shapes(op: Op) -> list[Shape]:
    """The GPU's, with few tokens: a kernel never depends on how many there are."""
    short = [
        Shape(
            {name: min(size, FEW) if name == "L" else size for name, size in shape.sizes.items()}, shape.dtype
        )
        for shape in op.gpu_shapes
    ]
    return list({(str(shape), shape.dtype): shape for shape in short}.values())


class NoRandomNumbers(TorchFunctionMode):
    """Zeros in place of random floats, whose drawing would take most of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.rand):
            kwargs.pop("generator", None)
            return torch.zeros(*args, **kwargs)
        return func(*args, **kwargs)


def build_row(*fields: object) -> KernelResources:
    """A row of its first fields, usage and widths."""
    *label, usage, widths = fields
    return KernelResources(*label, **asdict(usage), **asdict(widths))


def print_table(rows: Sequence[KernelResources]) -> None:
    """A line for each kernel of an op and chip: ranges over its configurations, widths of the first."""
    table = Table(*COLUMNS)
    groups: dict[tuple[str, str, int], list[KernelResources]] = {}
    for row in rows:
        groups.setdefault((row.op, row.kernel, row.capability), []).append(row)
    for (op, kernel, capability), group in groups.items():
        names = ("num_warps", "registers", "stack_bytes", "shared_bytes")
        ranges = (format_range(getattr(row, name) for row in group) for name in names)
        widths = (format_widths(group[0].loads), format_widths(group[0].stores))
        table.add_row(op, kernel, f"sm_{capability}", str(len(group)), *ranges, *widths)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def format_range(numbers: Iterable[int]) -> str:
    """`32-56`, or the one number."""
    ordered = sorted(set(numbers))
    return str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]}-{ordered[-1]}"


def format_widths(widths: dict[int, int]) -> str:
    """`6x16 1x4`: six of 16 bytes, one of 4; the widest first."""
    return " ".join(f"{count}x{width}" for width, count in sorted(widths.items(), reverse=True))


def write_rows(rows: Sequence[KernelResources], path: Path) -> None:
    """One JSON object a line, in place of what the file held: it says what the code of now compiles to."""
    origin = describe_origin()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row) | origin) + "\n" for row in rows)


def describe_origin() -> dict[str, str]:
    """The commit and the compilers."""
    return {
        "commit": name_commit(),
        "triton": version("triton"),
        "triton_ptxas": find_version(find_tool("ptxas")),
        "nvcc": find_version(find_nvcc()),
    }


def find_version(tool: Path | None) -> str:
    """The release a tool of CUDA says it is; empty without the tool."""
    if tool is None:
        return ""
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release [\d.]+, V([\d.]+)", text)[1]


if __name__ == "__main__":
    sys.exit(main())
