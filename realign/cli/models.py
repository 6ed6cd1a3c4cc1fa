"""What a command needs to know of a model before loading it: its folder, its config, its fingerprint."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from realign.cli.console import UsageError
from realign.model.config import BagelConfig

BLOCK_BYTES = 2**16
NUM_BLOCKS = 256
MODEL_FILES = re.compile(
    r"config\.json|(llm|vit|ae|tokenizer)_config\.json|vocab\.json|merges\.txt|tokenizer\.json|added_tokens\.json"
    r"|.+\.safetensors|.+\.safetensors\.index\.json"
)


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint on disk that has been looked at, not loaded. `name` is as the command line gave it."""

    name: str
    path: Path
    config: BagelConfig

    @classmethod
    def find(cls, name: str) -> ModelFolder:
        """Raises UsageError for a folder that is not there, or has no model that can be read."""
        from realign.model.weights import find_folder

        try:
            path = find_folder(name)
            config = BagelConfig.load(path)
        except (ValueError, OSError) as error:
            raise UsageError(f"--model {name}: {error}") from error
        if not list(path.glob("*.safetensors")):
            what = f"{path} has no *.safetensors (pickled weights are never loaded)"
            raise UsageError(f"--model {name}: {what}; give a folder with a BAGEL checkpoint")
        return cls(name, path, config)

    def fingerprint(self) -> str:
        """A hash of the model's files: small ones whole; of a large one 256 blocks spread over it."""
        digest = hashlib.sha256()
        for path in sorted(self.path.iterdir()):
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
