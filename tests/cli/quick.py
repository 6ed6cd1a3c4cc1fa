"""An engine that is done at once, runs killed at a chosen write, and what they leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from tests.cli.support import list_files


class QuickEngine:
    """Stands in for the model: pictures that depend on the request alone, at once."""

    backend = SimpleNamespace(name="none")

    def stream(self, requests: Iterable, options: object) -> Iterator[SimpleNamespace]:
        for request in requests:
            yield SimpleNamespace(request=request, image=self._draw(request), reasoning=None)

    def _draw(self, request) -> Image.Image:
        rng = np.random.default_rng(list(request.id.encode()))
        return Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but the locks and the times in run.json."""
    names = set(list_files(folder)) - {".realign/lock", ".realign/claims", "run.json", "index.html"}
    return {name: (folder / name).read_bytes() for name in names}


def die_at(kill_at: int) -> None:
    """Kill this process at its write number `kill_at`: even numbers just before it, odd ones just after."""
    moments = count()

    def deadly(call: Callable) -> Callable:
        def wrapped(*arguments: object) -> object:
            if next(moments) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments)
            if next(moments) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in ("fsync", "replace", "rename", "pwrite", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
