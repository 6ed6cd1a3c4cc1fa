"""How many warps of a kernel a multiprocessor holds at once, and how a grid of programs fills a chip.

A warp takes its registers in units, from its own quarter of the register file; a block takes shared memory in
units, and some more that the system keeps for itself. The blocks that fit are the fewest of what registers,
shared memory, and the numbers of warps and blocks allow (CUDA C++ Programming Guide, tables of compute
capabilities; CUDA's occupancy calculator).
"""

from __future__ import annotations

from dataclasses import dataclass

LANES = 32
PARTITIONS = 4  # of a multiprocessor: each has a quarter of the registers and of the warps
REGISTER_UNIT = 256  # registers are given to a warp in multiples of this
SHARED_UNIT = 128  # and bytes to a block
RESERVED_BYTES = 1024  # of shared memory, in each block


@dataclass(frozen=True)
class Processor:
    """What a multiprocessor holds at most, and how many of them the chip has."""

    chip: str
    count: int
    shared_bytes: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


PROCESSORS = {80: Processor("A100", 108, 164 * 1024), 90: Processor("H200", 132, 228 * 1024)}


@dataclass(frozen=True)
class Occupancy:
    """Blocks on a multiprocessor, their warps, and of which resource there is not enough for another one."""

    blocks: int
    warps: int
    limit: str

    def share(self, processor: Processor) -> float:
        """Of the warps that a multiprocessor can hold."""
        return self.warps / processor.warps


@dataclass(frozen=True)
class Grid:
    """Programs of a launch, the waves they run in, and how full the last of these is (1 if it is full).

    A wave is as many programs as the chip holds at once: 2.25 waves take about as long as 3.
    """

    programs: int
    waves: float
    last_wave: float


def find_occupancy(processor: Processor, num_warps: int, registers: int, shared_bytes: int) -> Occupancy:
    """Of blocks of `num_warps`, with this many registers a thread and this much shared memory a block."""
    limits = {
        "warps": processor.warps // num_warps,
        "blocks": processor.blocks,
        "registers": _count_warps(processor, registers) // num_warps,
        "shared": processor.shared_bytes // _round_up(shared_bytes + RESERVED_BYTES, SHARED_UNIT),
    }
    limit = min(limits, key=limits.get)
    return Occupancy(limits[limit], limits[limit] * num_warps, limit)


def describe_grid(processor: Processor, blocks: int, programs: int) -> Grid:
    """How `programs` fill the chip, `blocks` of them on a multiprocessor."""
    at_once = max(blocks, 1) * processor.count
    rest = programs % at_once
    return Grid(programs, round(programs / at_once, 3), round(rest / at_once, 3) if rest else 1.0)


def _count_warps(processor: Processor, registers: int) -> int:
    """For which there are registers."""
    of_warp = _round_up(max(registers, 1) * LANES, REGISTER_UNIT)
    return processor.registers // PARTITIONS // of_warp * PARTITIONS


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
