"""The Qwen2 tokenizer with BAGEL's four marker tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What a folder may hold of a tokenizer; those that are there are kept, and written again by `save`.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
MARKERS = {
    "bos": "<|im_start|>",
    "eos": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}


class Tokenizer:
    """Text to ids and back.

    `bos` and `eos` frame a turn of text, `start_of_image` and `end_of_image` a picture. These markers are
    added where the folder's vocabulary lacks them, in this order, behind its last id.
    """

    def __init__(self, backend: Any, files: dict[str, bytes]) -> None:
        backend.add_tokens([token for token in MARKERS.values() if token not in backend.get_vocab()])
        self._backend = backend
        self._files = files
        self.bos, self.eos, self.start_of_image, self.end_of_image = (
            backend.convert_tokens_to_ids(token) for token in MARKERS.values()
        )

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """From a folder with `vocab.json` and `merges.txt`, or `tokenizer.json`; nothing is fetched.

        Raises `ValueError` naming the folder where they are missing or cannot be read.
        """
        from transformers import Qwen2Tokenizer  # imported late: slow, and the model alone does not need it

        folder = Path(folder)
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files.keys():
            raise ValueError(f"{folder}: no tokenizer: expected vocab.json and merges.txt, or tokenizer.json")
        _check_files(folder, files)
        backend = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
        return cls(backend, files)

    def __len__(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without markers around it."""
        # Not verbose: a text that is too long is for the caller to refuse, in one line.
        return self._backend.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, markers included."""
        return self._backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, folder: str | Path) -> None:
        """Write the files that it was loaded from."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / name).write_bytes(content)


def _check_files(folder: Path, files: dict[str, bytes]) -> None:
    """What is cut short or garbled is named here: the library's own error for it has no type and no file."""
    for name, content in files.items():
        try:
            text = content.decode()
            if name.endswith(".json") and not isinstance(json.loads(text), dict):
                raise ValueError("expected a JSON object")
        except ValueError as error:  # of which both decoding errors are kinds
            raise ValueError(f"{folder / name}: the tokenizer file cannot be read: {error}") from None
    if {"vocab.json", "merges.txt"} <= files.keys():
        _check_merges(folder, json.loads(files["vocab.json"]), files["merges.txt"].decode())


def _check_merges(folder: Path, vocabulary: dict[str, Any], merges: str) -> None:
    """Ids are whole numbers; each merge is two pieces that the vocabulary has, and so is what they make."""
    for piece, number in vocabulary.items():
        if not isinstance(number, int):
            raise ValueError(f"{folder / 'vocab.json'}: the id of {piece!r} is {number!r}: must be a number")
    for line, text in enumerate(merges.split("\n"), start=1):
        pieces = text.rstrip("\r").split(" ")
        if pieces == [""] or text.startswith("#version"):
            continue
        if len(pieces) != 2 or not {*pieces, "".join(pieces)} <= vocabulary.keys():
            raise ValueError(
                f"{folder / 'merges.txt'}: line {line} is {text[:60]!r}: must be two pieces of vocab.json"
            )
