"""Builds `realign_kernels._C` from csrc/ where a C++ compiler is, and `_C_cuda` where nvcc is too.

Each is optional: what cannot be built gives one notice, and the install goes on without it. All else is in
pyproject.toml. The sources use no torch headers, so the build needs pybind11 only.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

sys.path.insert(0, str(Path(__file__).parent))  # an isolated build leaves it out
from csrc.nvcc import NOT_FOUND, build_command, find_nvcc

CUDA_BINDINGS = "csrc/cuda_bindings.cpp"
BUILD_ERRORS = (
    CCompilerError,
    CompileError,
    ExecError,
    LinkError,
    PlatformError,
    OSError,
    subprocess.CalledProcessError,
)
# No contraction: results are the same bits on every machine, and equal plain torch where no sum is involved.
# Nobody reads the floating-point exception flags: without them GCC vectorises loops that choose between two
# numbers.
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-g0",
]


class OptionalBuildExt(build_ext):
    """Builds what can be built; prints one notice for what cannot."""

    def run(self) -> None:
        try:
            super().run()
        except BUILD_ERRORS as error:
            print_notice("_C", error, "plain torch is used instead")

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_C_cuda"):
            self._build_cuda(ext)
            return
        try:
            if self._has_openmp():
                ext.extra_compile_args.append("-fopenmp")
                ext.extra_link_args.append("-fopenmp")
            super().build_extension(ext)
        except BUILD_ERRORS as error:
            print_notice("_C", error, "plain torch is used instead")

    def _build_cuda(self, ext: Extension) -> None:
        nvcc, target = find_nvcc(), Path(self.get_ext_fullpath(ext.name))
        if nvcc is None:
            print_notice("_C_cuda", NOT_FOUND, "impl='cuda' cannot run")
            return
        newest = max(Path(path).stat().st_mtime for path in (*ext.sources, *ext.depends, "csrc/nvcc.py"))
        if target.exists() and target.stat().st_mtime > newest and not self.force:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [*ext.include_dirs, sysconfig.get_path("include")]
        try:
            subprocess.run(build_command(nvcc, ext.sources, includes, target), check=True)
        except BUILD_ERRORS as error:
            target.unlink(missing_ok=True)
            print_notice("_C_cuda", error, "impl='cuda' cannot run")

    def _has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_preargs=["-fopenmp"])
                self.compiler.link_executable(
                    objects, str(Path(folder, "probe")), extra_postargs=["-fopenmp"]
                )
            except (CompileError, LinkError):
                return False
        return True


def print_notice(name: str, reason: Exception | str, consequence: str) -> None:
    """One line, that a person can act on."""
    print(f"NOTICE: realign_kernels.{name} is not built ({reason}); {consequence}.")


def build_extensions() -> list[Extension]:
    """The two extensions, or none where pybind11 is not installed."""
    try:
        import pybind11
    except ImportError:
        print_notice("_C", "no pybind11", "plain torch is used instead")
        return []
    headers, include_dirs = sorted(glob("csrc/*.h")), ["csrc", pybind11.get_include()]
    return [
        Extension(
            "realign_kernels._C",
            sources=sorted(set(glob("csrc/*.cpp")) - {CUDA_BINDINGS}),
            depends=headers,
            include_dirs=include_dirs,
            extra_compile_args=list(COMPILE_FLAGS),
            language="c++",
            optional=True,
        ),
        Extension(
            "realign_kernels._C_cuda",
            sources=[CUDA_BINDINGS, *sorted(glob("csrc/*.cu"))],
            depends=headers,
            include_dirs=include_dirs,
            optional=True,
        ),
    ]


setup(ext_modules=build_extensions(), cmdclass={"build_ext": OptionalBuildExt})
