"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, spills nothing, loads 16 bytes at a time.

The compiling runs in processes of its own: here Triton interprets.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.machine_code import count_ptx
from csrc.nvcc import CAPABILITIES

ROOT = Path(__file__).parents[2]


def run_compiling(module: str, cache: Path, *arguments: str) -> str:
    """What `python -m module` prints, in a process where Triton compiles. It exits with 1 for a spill."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, dict]:
    return json.loads(run_compiling("tests.kernels.aot_kernels", tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("aot")
    run_compiling("bench.aot", folder, "--out", str(folder / "rows.jsonl"))
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def list_kernels() -> set[str]:
    """Names of the kernels: functions with `@triton.jit` that no other such function calls."""
    trees = [ast.parse(path.read_text()) for path in ROOT.glob("realign_kernels/**/*.py")]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    compiled = [node for node in functions if "triton.jit" in " ".join(map(ast.unparse, node.decorator_list))]
    calls = [call for node in compiled for call in ast.walk(node) if isinstance(call, ast.Call)]
    return {node.name for node in compiled} - {ast.unparse(call.func) for call in calls}


@pytest.mark.slow
def test_every_kernel_compiles_for_every_chip(rows):
    kernels = list_kernels()
    assert "guided_flow_step_kernel" in kernels
    compiled = {(row["kernel"], row["capability"]) for row in rows}
    assert not {(kernel, chip) for kernel in kernels for chip in CAPABILITIES} - compiled


@pytest.mark.slow
def test_every_op_on_triton_has_rows(rows):
    ops = {path.parent.name for path in ROOT.glob("realign_kernels/*/triton.py")}
    assert not ops - {row["op"].partition(".")[0] for row in rows}


@pytest.mark.slow
def test_nothing_spills(rows):
    assert [row for row in rows if row["stack_bytes"]] == []


# Kernels that read no tensor of tokens, only numbers of samples; and one that reads pixels of three bytes.
NARROW = {"group_advantage_kernel", "grpo_loss_kernel", "philox_normal_kernel", "clip_preprocess_kernel"}


@pytest.mark.slow
def test_aligned_tensors_of_tokens_are_loaded_16_bytes_at_a_time(rows):
    timed = [row for row in rows if row["language"] == "triton" and row["is_timed"]]
    read = [row for row in timed if row["kernel"] not in NARROW]
    assert read
    assert [row for row in read if "16" not in row["loads"]] == []


@pytest.mark.slow
def test_every_timed_kernel_fits_and_has_grids(rows):
    timed = [row for row in rows if row["language"] == "triton" and row["is_timed"]]
    assert [row for row in timed if row["blocks"] < 1 or not row["grids"]] == []
    swiglu = next(row for row in timed if row["op"] == "swiglu" and row["capability"] == 90)
    assert swiglu["grids"]["L16384 E18944 bfloat16"]["programs"] == 16384 * 18944 // 2048


@pytest.mark.slow
def test_blocks_of_cuda_kernels_are_those_of_their_bounds(rows):
    cuda = [row for row in rows if row["language"] == "cuda" and row["capability"] == 90]
    assert {(row["num_warps"], row["blocks"]) for row in cuda} <= {(8, 2)}


def test_arguments_are_specialised_as_at_a_launch(cases):
    told = {name: case.get("configuration") for name, case in cases.items()}
    assert told["aligned"] == "p_x:*fp32 p_bias=None p_out:*fp32 factor:fp32 size:i32 stride=1 BL=1024"
    assert "p_bias:*bf16" in told["half"]
    assert "p_x:*fp32!" in told["shifted"]
    assert "size:i32!" in told["shifted"]
    assert "size:i64 stride:i32!" in told["strided"]


def test_batches_of_one_block_share_a_kernel(cases):
    assert cases["batches"] == {"sum_squares_kernel": 1, "guided_flow_step_kernel": 1}


def test_widths_are_those_of_the_machine_code(cases):
    assert cases["aligned"]["loads"] == cases["aligned"]["stores"] == {"16": 2}
    assert cases["ampere"]["loads"] == {"16": 2}
    assert cases["shifted"]["loads"] == {"4": 8}
    assert cases["strided"]["loads"] == {"4": 8}
    assert cases["strided"]["stores"] == {"16": 2}


def test_a_spill_is_seen(cases):
    assert cases["spilled"]["stack_bytes"] > 0
    assert cases["summed"]["stack_bytes"] == 0
    assert cases["summed"]["shared_bytes"] > 0


def test_widths_are_read_from_ptx():
    ptx = """
    ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    ld.global.nc.v2.f32 {%f1, %f2}, [%rd1];
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x8;
    @%p1 st.global.b64 [ %rd3 + 0 ], { %rd4 };
    ld.param.b64 %rd1, [k_param_0];
    st.shared.v4.b32 [ %r1 ], { %r1, %r2, %r3, %r4 };
    """
    widths = count_ptx(ptx)
    assert widths.loads == {16: 2, 2: 1, 8: 1}
    assert widths.stores == {8: 1}


def test_the_interpreter_is_refused(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.aot", "--out", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TRITON_INTERPRET" in done.stderr
