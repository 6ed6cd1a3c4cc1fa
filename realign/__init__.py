"""Interleaved prompts to pictures with structured reasoning, on BAGEL.

generator = realign.load("mini")
samples = generator.generate(["a red star on the beach"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realign.api import Generator

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str = "mini", **options: Any) -> Generator:
    """Load a model folder, or the embedded "mini", as a `Generator`; options as of `realign.api.load`."""
    from realign.api import load as load_generator  # imported late: it brings torch

    return load_generator(path, **options)
