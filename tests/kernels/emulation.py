"""The CUDA path without a GPU: its bindings, with an emulation of clusters in place of the kernels."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

CSRC = Path(__file__).parents[2] / "csrc"
EMULATOR = Path(__file__).with_name("cluster_emulator.cpp")


def find_compiler() -> str | None:
    """The C++ compiler of this machine, or None."""
    names = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build_emulated_module(folder: Path) -> ModuleType:
    """A module as `realign_kernels._C_cuda`, of which the launches run on CPU tensors."""
    target = folder / "_C_cuda.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-fvisibility=hidden"]
    folders = [f"-I{path}" for path in (CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
    sources = [CSRC / "cuda_bindings.cpp", EMULATOR]
    subprocess.run([find_compiler(), *flags, *folders, *sources, "-o", target], check=True)
    spec = importlib.util.spec_from_file_location(f"{folder.name}._C_cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
