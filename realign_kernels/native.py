"""The compiled extension `realign_kernels._C`, where there is one."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        extension = importlib.import_module("realign_kernels._C")
    except ImportError as error:
        return None, f"the compiled extension is not there ({error})"
    return extension, f"compiled extension: {extension.__file__}"


_C, _STATE = _load_extension()


def is_available() -> bool:
    """True if the compiled extension was built and loads."""
    return _C is not None


def describe() -> str:
    """One line: where the extension is, or why it is not."""
    return _STATE
