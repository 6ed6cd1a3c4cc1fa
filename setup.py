"""Builds `realign_kernels._C` from csrc/ where a C++ compiler is, and goes on without it where none is.

All else is in pyproject.toml. The sources use no torch headers, so the build needs pybind11 only.
"""

from __future__ import annotations

import tempfile
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, CompileError, ExecError, LinkError, PlatformError

BUILD_ERRORS = (CCompilerError, CompileError, ExecError, LinkError, PlatformError, OSError)
# No contraction: results are the same bits on every machine, and equal plain torch where no sum is involved.
COMPILE_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-g0"]


class OptionalBuildExt(build_ext):
    """Builds what can be built; prints one notice where that is nothing."""

    def run(self) -> None:
        try:
            super().run()
        except BUILD_ERRORS as error:
            self._print_notice(error)

    def build_extension(self, ext: Extension) -> None:
        try:
            if self._has_openmp():
                ext.extra_compile_args.append("-fopenmp")
                ext.extra_link_args.append("-fopenmp")
            super().build_extension(ext)
        except BUILD_ERRORS as error:
            self._print_notice(error)

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

    def _print_notice(self, error: Exception) -> None:
        print(f"NOTICE: realign_kernels._C was not built ({error}); plain torch is used instead.")


def build_extensions() -> list[Extension]:
    """The one extension, or none where pybind11 is not installed."""
    try:
        import pybind11
    except ImportError:
        print("NOTICE: realign_kernels._C is not built (no pybind11); plain torch is used instead.")
        return []
    return [
        Extension(
            "realign_kernels._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            include_dirs=["csrc", pybind11.get_include()],
            extra_compile_args=list(COMPILE_FLAGS),
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=build_extensions(), cmdclass={"build_ext": OptionalBuildExt})
