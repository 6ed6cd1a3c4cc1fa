"""`python -m bench.aot`: compile every kernel for sm_80 and sm_90, no GPU needed, and say what each takes.

A row in `results/aot.jsonl` per kernel and configuration: registers, stack (spills are there), shared memory,
widths of loads and stores, what a multiprocessor holds of it at once, and how its grids at BAGEL's sizes fill
the chip. Triton's launches are recorded from the bench entries and `bench.variants`, with
tensors on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.overrides import TorchFunctionMode

from bench.compiling import compile_cuda, compile_triton, specialise
from bench.machine_code import Usage, Widths, find_tool
from bench.occupancy import PROCESSORS, Grid, describe_grid, find_occupancy
from bench.registry import OPS
from bench.rows import RESULTS as FOLDER
from bench.rows import name_commit
from bench.variants import VARIANTS
from csrc.nvcc import CAPABILITIES, NOT_FOUND, find_nvcc
from realign_kernels import launch

ROOT = Path(__file__).parents[1]
RESULTS = FOLDER / "aot.jsonl"
LARGE = 1 << 20  # numbers of a tensor
FLOATS = [(dtype,) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
COLUMNS = (
    "op",
    "kernel",
    "chip",
    "configurations",
    "warps",
    "registers",
    "shared",
    "blocks",
    "held",
    "waves",
    "loads",
    "stores",
)


@dataclass(frozen=True)
class KernelResources:
    """One compiled kernel, as it stands in `results/aot.jsonl`.

    Attributes:
        configuration: see `Specialised.describe`; of a CUDA kernel, its template arguments.
        capability: ten times the compute capability: 80, 90.
        num_warps: of a block; of a CUDA kernel, those of its launch bounds.
        is_timed: whether a bench entry runs this configuration; of CUDA kernels always.
        registers: per thread.
        stack_bytes: per thread; not 0 means spilled registers, or arrays outside registers.
        shared_bytes: per block, without what the launch of a CUDA kernel adds.
        loads, stores: number of instructions on global memory by their width in bytes.
        blocks: on a multiprocessor at once; of a CUDA kernel at most, as its launch may add shared memory.
        occupancy: their warps, as a share of those that it can hold.
        limit: what there is not enough of for another block: registers, shared, warps, blocks.
        grids: of the launches of the bench entries, by shape.
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
    blocks: int
    occupancy: float
    limit: str
    grids: dict[str, Grid] = field(default_factory=dict)

    def add_grid(self, shape: str, programs: int) -> None:
        """A launch of this configuration."""
        self.grids[shape] = describe_grid(PROCESSORS[self.capability], self.blocks, programs)


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
        build_row((source.stem, "cuda", *name, capability, num_warps, True), *resources)
        for capability in capabilities
        for name, (num_warps, *resources) in compile_cuda(source, capability).items()
    ]


def compile_op(name: str, capabilities: Sequence[int]) -> list[KernelResources]:
    """One row per distinct configuration of the op's Triton kernels and chip."""
    rows: dict[tuple, KernelResources] = {}
    for shape, recorded in record_launches(name):
        for capability in capabilities:
            chosen = specialise(recorded, capability)
            label = (chosen.kernel.__name__, chosen.describe(), capability, recorded.num_warps)
            if label not in rows:
                is_timed = shape is not None
                compiled = compile_triton(chosen, capability)
                rows[label] = build_row((name, "triton", *label, is_timed), *compiled)
            if shape is not None:
                rows[label].add_grid(shape, math.prod(recorded.grid))
    return list(rows.values())


def record_launches(name: str) -> Iterator[tuple[str | None, launch.Launch]]:
    """The launches of an op's Triton run by shape, and, without one, those of its variants, if it has any."""
    for shape in OPS[name].gpu_shapes:
        with launch.record_launches() as launches, torch.no_grad(), NoNumbers():
            run = OPS[name].build(shape, torch.device("cpu")).runs.get("triton")
            if run is not None:
                run()
        yield from ((f"{shape} {shape.dtype}".replace("torch.", ""), recorded) for recorded in launches)
    with launch.record_launches() as launches, torch.no_grad():
        VARIANTS.get(name, lambda: None)()
    yield from ((None, recorded) for recorded in launches)


class NoNumbers(TorchFunctionMode):
    """Memory that nobody touches in place of random floats, and of many numbers put into another dtype.

    At BAGEL's sizes most of the time would go into them, and no launch depends on their values.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.randn, torch.rand):
            kwargs.pop("generator", None)
            return torch.empty(*args, **kwargs)
        if func is torch.Tensor.to and args[0].numel() > LARGE and args[1:] in FLOATS:
            return torch.empty_like(args[0], dtype=args[1])
        return func(*args, **kwargs)


def build_row(label: tuple, usage: Usage, widths: Widths) -> KernelResources:
    """A row without grids."""
    *_, capability, num_warps, _ = label
    processor = PROCESSORS[capability]
    held = find_occupancy(processor, num_warps, usage.registers, usage.shared_bytes)
    share = round(held.share(processor), 3)
    taken = asdict(usage) | asdict(widths)
    return KernelResources(*label, **taken, blocks=held.blocks, occupancy=share, limit=held.limit)


def print_table(rows: Sequence[KernelResources]) -> None:
    """A line for each kernel of an op and chip: ranges over what is timed, if any is, widths of the first."""
    table = Table(*COLUMNS)
    groups: dict[tuple[str, str, int], list[KernelResources]] = {}
    for row in rows:
        groups.setdefault((row.op, row.kernel, row.capability), []).append(row)
    for (op, kernel, capability), all_rows in groups.items():
        group = [row for row in all_rows if row.is_timed] or all_rows
        names = ("num_warps", "registers", "shared_bytes", "blocks")
        ranges = (format_range(getattr(row, name) for row in group) for name in names)
        widths = (format_widths(group[0].loads), format_widths(group[0].stores))
        held = format_range(round(100 * row.occupancy) for row in group) + "%"
        waves = format_range(grid.waves for row in group for grid in row.grids.values())
        table.add_row(op, kernel, f"sm_{capability}", str(len(all_rows)), *ranges, held, waves, *widths)
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def format_range(numbers: Iterable[float]) -> str:
    """`32-56`, or the one number, or nothing."""
    ordered = sorted(set(numbers)) or [""]
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
