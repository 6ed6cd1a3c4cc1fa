"""Finds NVIDIA's compiler, and says how csrc/*.cu is compiled: for setup.py, and for bench and tests."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

# No contraction: results equal plain torch's, bit for bit, where no sum is involved.
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false")
CAPABILITIES = (80, 90)
NOT_FOUND = "no nvcc: neither in CUDA_HOME nor on PATH nor from pip (nvidia-cuda-nvcc)"


def find_nvcc() -> Path | None:
    """The compiler of CUDA_HOME or CUDA_PATH, else that on PATH, else that of the PyPI packages, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home, "bin", "nvcc") for home in homes]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates += [path for folder in sys.path for path in sorted(Path(folder).glob("nvidia/*/bin/nvcc"))]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def build_command(nvcc: Path, sources: Sequence[str], includes: Sequence[str], target: Path) -> list[str]:
    """The command that makes a Python module of CUDA and C++ files; newer chips compile its PTX at the start.

    CUDA's runtime is linked into it, so that it loads where there is no CUDA and beside any CUDA of torch's.
    """
    machine = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in CAPABILITIES]
    portable = f"-gencode=arch=compute_{CAPABILITIES[-1]},code=compute_{CAPABILITIES[-1]}"
    host = ["-ccbin", os.environ["CXX"].split()[0]] if os.environ.get("CXX") else []
    options = ["-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden,-g0", "--threads=2"]
    folders = [f"-I{folder}" for folder in includes]
    return [
        str(nvcc),
        *NVCC_FLAGS,
        *machine,
        portable,
        *host,
        *options,
        *folders,
        *sources,
        "-o",
        str(target),
    ]
