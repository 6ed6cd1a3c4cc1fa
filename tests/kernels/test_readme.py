"""The page of the ops: its examples run, one after another, and it leaves no op out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import realign_kernels

PAGE = (Path(realign_kernels.__file__).parent / "README.md").read_text(encoding="utf-8")
OPS = sorted(path.parent.name for path in Path(realign_kernels.__file__).parent.glob("*/api.py"))


def test_examples_run():
    names = {name: getattr(realign_kernels, name) for name in realign_kernels.__all__}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(block, names)
    assert names["latents_next"].shape == names["latents"].shape


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_section_with_its_signature_and_a_use(op):
    (section,) = re.findall(rf"^## {op}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert f"`{op}(" in section
    assert f"{op}(" in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)[0]
    assert f"(#{op})" in PAGE
