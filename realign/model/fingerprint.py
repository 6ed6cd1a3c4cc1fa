"""Which checkpoint a folder holds, told without reading all of it. No torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

BLOCK_BYTES = 2**16
NUM_BLOCKS = 256
MODEL_FILES = re.compile(
    r"config\.json|(llm|vit|ae|tokenizer)_config\.json|vocab\.json|merges\.txt|tokenizer\.json|added_tokens\.json"
    r"|.+\.safetensors|.+\.safetensors\.index\.json"
)


def hash_checkpoint(folder: Path) -> str:
    """A hash of a model's files: small ones whole; of a large one 256 blocks spread over it."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if MODEL_FILES.fullmatch(path.name):
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            _update_from_blocks(digest, path)
    return digest.hexdigest()


def _update_from_blocks(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    stride = max(BLOCK_BYTES, size // NUM_BLOCKS)
    with path.open("rb") as file:
        for offset in range(0, size, stride):
            file.seek(offset)
            digest.update(file.read(BLOCK_BYTES))
        file.seek(max(0, size - BLOCK_BYTES))
        digest.update(file.read(BLOCK_BYTES))
