"""Pictures as PNG files that say in their metadata how they were made, and whether such a file is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import realign
from realign.data.images import DAMAGE_ERRORS

METADATA_KEY = "realign"


def save_png(image: Image.Image, file: IO[bytes], metadata: Mapping[str, Any]) -> None:
    """Write a picture with `metadata` as JSON in the text chunk `realign`; equal arguments, equal bytes."""
    chunks = PngInfo()
    chunks.add_text("Software", f"realign {realign.__version__}")
    chunks.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False))
    image.save(file, format="PNG", pnginfo=chunks)


def load_metadata(path: Path) -> dict[str, Any]:
    """What a picture says of itself: `record` and `settings`; empty where it says nothing."""
    with Image.open(path, formats=("PNG",)) as image:
        text = image.info.get(METADATA_KEY)
    try:
        metadata = json.loads(text) if isinstance(text, str) else {}
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def is_whole_png(path: Path) -> bool:
    """Whether the file is a PNG with every chunk's checksum right, to its end."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    except DAMAGE_ERRORS:
        return False
    return True
