"""Libraries that cannot be imported as they come.

torchvision is on PyPI as CUDA builds alone. Beside a CPU build of torch its compiled part does not load, so
that `import torchvision` fails ("operator torchvision::nms does not exist"), and with it open_clip, timm,
peft, diffusers and most of transformers. What fails is the description of two operators that only object
detectors call; declaring their names is enough.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[Any] = []  # operators last as long as the library that declared them


@cache
def mend_torchvision() -> None:
    """Make `import torchvision` work; to be called before what imports it. Without torchvision: nothing."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _declare_operators()
        import torchvision  # noqa: F401


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        library.define(operator)
    _declared.append(library)


def import_open_clip() -> ModuleType:
    """The module `open_clip`."""
    mend_torchvision()
    import open_clip

    return open_clip
