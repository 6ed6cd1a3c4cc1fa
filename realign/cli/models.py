"""What a command needs to know of a model before loading it: its folder, its config, its fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from realign.cli.console import UsageError
from realign.model.config import BagelConfig
from realign.model.fingerprint import hash_checkpoint


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
        """See `hash_checkpoint`."""
        return hash_checkpoint(self.path)
