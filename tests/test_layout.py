"""The tree: imports point one way, and every op has a definition, a test and a bench row."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("csrc", "realign_kernels", "realign", "train", "bench", "tests")

# What the modules of a part may import of this repository, besides the part itself. Left out: everything.
# `reasoning` has two layers: schemas and prompts are plain data for all; the programs run on the runtime.
TEXTS = ("realign.reasoning.schemas", "realign.reasoning.prompts")
ALLOWED = {
    "realign_kernels": (),
    "realign.model": ("realign_kernels",),
    "realign.runtime": ("realign_kernels", "realign.model"),
    "realign.reasoning": ("realign.model", "realign.runtime"),
    "realign.data": ("realign.model", "realign.world", *TEXTS),
    "realign.world": ("realign.data", *TEXTS),
    "realign.rewards": (
        "realign_kernels",
        "realign.libraries",
        "realign.model",
        "realign.data",
        "realign.world",
        *TEXTS,
    ),
    "realign.gallery": ("realign.data",),
    "realign.evals": ("realign_kernels", "realign"),
    "realign.cli": ("realign_kernels", "realign"),
    "realign": ("realign_kernels", "realign"),
    "train": ("realign_kernels", "realign"),
}
EXTRAS = {  # what a package may import beside the project's dependencies
    "realign_kernels": ("triton",),
    "train": ("ablation", "deepspeed"),
    "bench": ("triton", "test", "bench"),
    "tests": ("triton", "tensorboard", "test"),
}
NEVER = {"realign": ("realign.cli",), "realign.evals": ("realign.cli",)}


def list_sources(package: str) -> list[Path]:
    return sorted(ROOT.glob(f"{package}/**/*.py"))


def name_module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def iterate_imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, `from a import b` giving `a.b`."""
    module = name_module(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def find_part(module: str) -> str:
    return max((part for part in ALLOWED if is_within(module, part)), key=len)


@pytest.mark.parametrize("package", ["realign_kernels", "realign", "train"])
def test_imports_point_one_way(package):
    wrong = []
    for path in list_sources(package):
        module = name_module(path)
        part = find_part(module)
        for name in iterate_imports(path):
            if not any(is_within(name, package) for package in PACKAGES):
                continue
            allowed = any(is_within(name, other) for other in (part, *ALLOWED[part]))
            if part in NEVER and any(is_within(name, other) for other in NEVER[part]):
                allowed = False
            if not allowed:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_texts_of_reasoning_need_no_runtime():
    for module in ("realign/reasoning/__init__.py", *(name.replace(".", "/") + ".py" for name in TEXTS)):
        path = ROOT / module
        imported = list(iterate_imports(path)) if path.exists() else []
        assert not [name for name in imported if is_within(name, "realign.runtime")], module


def test_csrc_knows_nothing_of_torch():
    for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/*.h")]:
        includes = re.findall(r"#include\s+[<\"]([^>\"]+)", path.read_text())
        assert not [name for name in includes if re.match(r"torch/|ATen/|c10/", name)], path.name


def list_ops() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("realign_kernels/*/__init__.py"))


def test_there_are_ops():
    assert "guided_flow_step" in list_ops()


@pytest.mark.parametrize("op", list_ops())
def test_every_op_has_its_four_places(op):
    import realign_kernels
    from bench.registry import OPS

    assert callable(getattr(realign_kernels, op))
    assert op in realign_kernels.__all__
    for path in (f"realign_kernels/{op}/api.py", f"realign_kernels/{op}/reference.py"):
        assert (ROOT / path).is_file(), f"{path} is missing"
    assert (ROOT / f"tests/kernels/test_{op}.py").is_file(), f"{op} has no test"
    assert op in OPS, f"{op} has no row in bench/registry.py"


def find_source(name: str) -> Path | None:
    """The file of a dotted name of this repository, which may end in what the module holds."""
    module = ROOT / name.replace(".", "/")
    return next(
        (path for path in (module.with_suffix(".py"), module.parent.with_suffix(".py")) if path.is_file()),
        None,
    )


def list_foreign_imports(path: Path) -> set[str]:
    """Packages besides torch and Python's own that a module needs, itself or by what it imports from here."""
    foreign = set()
    for name in iterate_imports(path):
        top = name.split(".")[0]
        if source := find_source(name):
            foreign |= list_foreign_imports(source)
        elif top != "torch" and top not in sys.stdlib_module_names:
            foreign.add(name)
    return foreign


@pytest.mark.parametrize("op", list_ops())
def test_a_reference_needs_torch_alone(op):
    assert not list_foreign_imports(ROOT / f"realign_kernels/{op}/reference.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_third_party_imports_are_declared(package):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][extra] for extra in EXTRAS.get(package, ())]
    declared = {re.split(r"[<>=\[ ]", line)[0].lower() for line in sum(extras, project["dependencies"])}
    imported = {
        (name.split(".")[0], str(path.relative_to(ROOT)))
        for path in list_sources(package)
        for name in iterate_imports(path)
    }
    distributions = {"PIL": "pillow", "open_clip": "open_clip_torch"}
    missing = [
        f"{path} imports {name}"
        for name, path in sorted(imported)
        if name not in sys.stdlib_module_names
        and name not in PACKAGES
        and distributions.get(name, name).lower() not in declared
    ]
    assert not missing, "\n".join(missing)
