"""What a multiprocessor holds agrees with known cases; grids are counted in waves; rows say both."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from bench.aot import RESULTS, KernelResources, build_row, print_table
from bench.machine_code import Usage, Widths
from bench.occupancy import PROCESSORS, Grid, Processor, describe_grid, find_occupancy

A100, H200 = PROCESSORS[80], PROCESSORS[90]
KIB = 1024


@pytest.mark.parametrize(
    ("processor", "num_warps", "registers", "shared", "blocks", "limit"),
    [
        (H200, 8, 32, 0, 8, "warps"),
        (H200, 4, 32, 0, 16, "warps"),
        (H200, 1, 32, 0, 32, "blocks"),
        (H200, 8, 33, 0, 6, "registers"),  # 40 of them are given: 48 warps, not 65536 / 33 / 32 = 62
        (H200, 8, 128, 0, 2, "registers"),
        (H200, 8, 255, 0, 1, "registers"),
        (H200, 12, 168, 0, 1, "registers"),  # three warps of each quarter: the kernels of three warpgroups
        (H200, 4, 168, 0, 3, "registers"),
        (H200, 16, 255, 0, 0, "registers"),  # cannot be launched
        (H200, 4, 32, 113 * KIB, 2, "shared"),
        (H200, 4, 32, 113 * KIB + 1, 1, "shared"),
        (H200, 4, 32, 227 * KIB, 1, "shared"),  # the most that a block may have
        (A100, 4, 32, 163 * KIB, 1, "shared"),
        (A100, 4, 32, 227 * KIB, 0, "shared"),
        (A100, 4, 32, 40 * KIB, 4, "shared"),  # 41 with what the system keeps
        (A100, 8, 64, 0, 4, "registers"),
    ],
)
def test_blocks_of_known_cases(processor: Processor, num_warps, registers, shared, blocks, limit):
    held = find_occupancy(processor, num_warps, registers, shared)
    assert (held.blocks, held.limit) == (blocks, limit)
    assert held.warps == blocks * num_warps <= processor.warps


@pytest.mark.parametrize(
    ("blocks", "programs", "expected"),
    [
        (2, 264, Grid(264, 1.0, 1.0)),
        (2, 265, Grid(265, 1.004, 0.004)),
        (1, 66, Grid(66, 0.5, 0.5)),
        (16, 5280, Grid(5280, 2.5, 0.5)),
        (1, 0, Grid(0, 0.0, 1.0)),
    ],
)
def test_waves_of_a_grid(blocks, programs, expected):
    assert describe_grid(H200, blocks, programs) == expected


def make_row(registers: int, is_timed: bool = True) -> KernelResources:
    label = ("swiglu", "triton", "swiglu_kernel", f"R={registers}", 90, 4, is_timed)
    return build_row(label, Usage(registers, 0, 0), Widths({16: 4}, {16: 2}))


def test_a_row_says_what_is_held_and_how_grids_fill_the_chip():
    row = make_row(64)
    assert (row.blocks, row.occupancy, row.limit) == (8, 0.5, "registers")
    row.add_grid("L4 bfloat16", 132 * 12)
    assert row.grids == {"L4 bfloat16": Grid(1584, 1.5, 0.5)}


def test_the_table_is_about_what_is_timed(capsys):
    timed = make_row(64)
    timed.add_grid("L4 bfloat16", 132 * 12)
    print_table([timed, make_row(255, is_timed=False)])
    printed = capsys.readouterr().out
    assert "50%" in printed
    assert "1.5" in printed
    assert "255" not in printed


def test_committed_rows_are_of_a_clean_tree_and_agree_with_the_formula():
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    assert {row["capability"] for row in rows} == set(PROCESSORS)
    for row in rows:
        assert "dirty" not in row["commit"]
        assert row["stack_bytes"] == 0
        taken = (row["num_warps"], row["registers"], row["shared_bytes"])
        held = find_occupancy(PROCESSORS[row["capability"]], *taken)
        assert (row["blocks"], row["limit"]) == (held.blocks, held.limit)
        for grid in row["grids"].values():
            again = describe_grid(PROCESSORS[row["capability"]], held.blocks, grid["programs"])
            assert grid == asdict(again)
