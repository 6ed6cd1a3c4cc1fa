"""The CUDA files compile for every chip without spills, load without a GPU; an install needs no nvcc."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.compiling import compile_cuda
from bench.machine_code import find_tool
from csrc import nvcc
from csrc.nvcc import CAPABILITIES, NOT_FOUND, NVCC_FLAGS, find_nvcc
from realign_kernels import guided_flow_step, native
from tests.kernels.emulation import find_compiler
from tests.kernels.flow_cases import make_case

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/*.cu"))
H200 = (132, 232448)  # processors, bytes of shared memory that a block may have
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason=NOT_FOUND)
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler here")


@pytest.fixture(scope="module", params=CAPABILITIES)
def compiled(request) -> tuple[int, dict]:
    if find_tool("cuobjdump") is None:
        pytest.skip("no cuobjdump here: neither Triton's nor on PATH")
    kernels = {}
    for source in SOURCES:
        kernels |= compile_cuda(source, request.param)
    return request.param, kernels


def test_there_is_no_torch_in_cuda_files():
    assert SOURCES
    assert not [path for path in SOURCES if re.search(r"#include\s+[<\"](torch|ATen|c10)/", path.read_text())]


@needs_nvcc
def test_every_cuda_file_compiles_without_spills(compiled):
    _, kernels = compiled
    assert {name for name, _ in kernels} == {"guided_flow_step_kernel"}
    assert [name for name, (_, usage, _) in kernels.items() if usage.stack_bytes] == []


@needs_nvcc
def test_aligned_kernels_load_and_store_16_bytes_at_a_time(compiled):
    chip, kernels = compiled
    if chip < 90:  # there are no clusters: the kernels are empty, and the launcher refuses
        assert all(not widths.loads for *_, widths in kernels.values())
        return
    aligned = [widths for (_, arguments), (*_, widths) in kernels.items() if arguments.endswith("true")]
    assert len(aligned) == 3
    # What is narrower reads or writes numbers of samples.
    assert all(set(widths.loads) == {4, 8, 16} and widths.loads[16] >= 24 for widths in aligned)
    assert all(set(widths.stores) == {4, 16} and widths.stores[4] == 1 for widths in aligned)


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_assembler_reports_no_spills_and_no_warnings(source, tmp_path):
    command = [find_nvcc(), *NVCC_FLAGS, "-Xptxas=-v", "-Xcompiler=-Wall", f"-arch=sm_{CAPABILITIES[-1]}"]
    done = subprocess.run(
        [*command, "-cubin", "-o", tmp_path / "kernels.cubin", source],
        capture_output=True,
        text=True,
        check=True,
    )
    report = done.stdout + done.stderr
    assert "warning" not in report
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) == len(registers) > 0
    assert set(spills) == {("0", "0", "0")}
    assert max(registers) <= 128  # two blocks of 256 threads fit on a processor


@needs_nvcc
def test_the_module_is_built_and_loads():
    assert native.has_cuda(), native.describe_cuda()
    assert native.describe_cuda().startswith("compiled CUDA kernels: ")
    assert "_C_cuda" in native.describe_cuda()


@needs_nvcc
@pytest.mark.parametrize(
    ("num_samples", "max_tokens", "max_cluster_size", "expected_size"),
    [
        (96, 4096, 16, 16),  # 64 KB a block: two fit on a processor
        (96, 4096, 8, 8),  # 128 KB: one fits
        (96, 1024, 16, 4),
        (16, 1024, 16, 16),  # so that there are two blocks for each processor
        (1, 16, 16, 16),
        (96, 16, 16, 4),
    ],
)
def test_clusters_are_as_small_as_fills_the_gpu(num_samples, max_tokens, max_cluster_size, expected_size):
    params = native._C_CUDA.ClusterStepParams()
    params.num_samples, params.num_channels, params.max_tokens = num_samples, 64, max_tokens
    size, kept_units, shared_bytes = native._C_CUDA.plan(params, *H200[:1], max_cluster_size, *H200[1:])
    assert size == expected_size
    assert kept_units * 8 == max_tokens * 64 // size
    assert kept_units * 32 < shared_bytes <= H200[1]


@needs_nvcc
def test_what_does_not_fit_is_not_kept():
    params = native._C_CUDA.ClusterStepParams()
    params.num_samples, params.num_channels, params.max_tokens = 1, 64, 70_000
    size, kept_units, shared_bytes = native._C_CUDA.plan(params, *H200[:1], 16, *H200[1:])
    assert size == 16
    assert 3.5e6 < size * kept_units * 32 < 70_000 * 64 * 4
    assert shared_bytes <= H200[1]


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_gpu_says_so():
    params = native._C_CUDA.ClusterStepParams()
    params.num_samples = 1
    with pytest.raises(RuntimeError, match=r"CUDA|device|driver"):
        native._C_CUDA.guided_flow_step(params, 0, 0)


@needs_nvcc
def test_tensors_on_the_cpu_are_refused():
    case = make_case([3], 8)
    with pytest.raises(ValueError, match=r"impl='cuda' cannot run: it runs on a GPU and a tensor is on cpu"):
        guided_flow_step(**case.guided(), **case.step(), impl="cuda")


def test_without_the_module_the_path_says_so(monkeypatch):
    monkeypatch.setattr(native, "_C_CUDA", None)
    monkeypatch.setattr(native, "_CUDA_STATE", "no compiled CUDA kernels (test)")
    case = make_case([3], 8)
    assert not native.has_cuda()
    with pytest.raises(ValueError, match=r"impl='cuda' cannot run: no compiled CUDA kernels \(test\)"):
        guided_flow_step(**case.guided(), **case.step(), impl="cuda")


def make_tool(folder: Path, script: str = "exit 0") -> Path:
    folder.mkdir(parents=True)
    tool = folder / "nvcc"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    return tool


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch):
    home, on_path = make_tool(tmp_path / "home/bin"), make_tool(tmp_path / "path")
    wheel = make_tool(tmp_path / "site/nvidia/cu13/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert find_nvcc() == home
    monkeypatch.delenv("CUDA_HOME")
    assert find_nvcc() == on_path
    monkeypatch.setenv("PATH", "")
    assert find_nvcc() == wheel
    monkeypatch.setattr(sys, "path", [])
    assert find_nvcc() is None


def build_copy(folder: Path, home: Path | None) -> str:
    """What the build prints for a tree of an empty C++ file and the CUDA bindings; it must not fail."""
    sources = folder / "csrc"
    sources.mkdir()
    shutil.copy(ROOT / "setup.py", folder)
    finder = Path(nvcc.__file__).read_text()
    if home is None:
        finder += "\n\ndef find_nvcc():\n    return None\n"
    (sources / "nvcc.py").write_text(finder)
    (sources / "empty.cpp").write_text("int empty() { return 0; }\n")
    (sources / "cuda_bindings.cpp").write_text("")
    environment = {**os.environ, "CUDA_HOME": str(home)}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("built/realign_kernels/_C.*"))) == 1
    return done.stdout


@needs_compiler
def test_without_nvcc_the_build_goes_on_with_one_notice(tmp_path):
    printed = build_copy(tmp_path, None)
    assert printed.count("NOTICE") == 1
    assert f"NOTICE: realign_kernels._C_cuda is not built ({NOT_FOUND}); impl='cuda' cannot run." in printed


@needs_compiler
def test_where_nvcc_fails_the_build_goes_on_with_one_notice(tmp_path):
    make_tool(tmp_path / "home/bin", "exit 3")
    printed = build_copy(tmp_path, tmp_path / "home")
    assert printed.count("NOTICE") == 1
    assert "_C_cuda is not built" in printed
    assert not list(tmp_path.glob("built/realign_kernels/_C_cuda*"))


@needs_compiler
def test_where_nvcc_works_the_module_is_built_once(tmp_path):
    script = f"for last; do :; done; echo built >> {tmp_path}/log; touch $last"
    make_tool(tmp_path / "home/bin", script)
    assert "NOTICE" not in build_copy(tmp_path, tmp_path / "home")
    assert len(list(tmp_path.glob("built/realign_kernels/_C_cuda*"))) == 1
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"]
    environment = {**os.environ, "CUDA_HOME": str(tmp_path / "home")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "log").read_text() == "built\n"
