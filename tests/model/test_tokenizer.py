"""The tokenizer: golden ids, markers, round trips."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realign.model.tokenizer import MARKERS, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


def test_golden_ids(tokenizer: Tokenizer, golden_json: dict) -> None:
    names = {"bos": "bos_token_id", "eos": "eos_token_id"}
    for name in MARKERS:
        assert getattr(tokenizer, name) == golden_json["token_ids"][names.get(name, name)]
    for text, ids in zip(golden_json["texts"], golden_json["text_ids"], strict=True):
        assert [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] == ids
    assert len(tokenizer) == tokenizer.end_of_image + 1


@given(text=st.text(max_size=40))
def test_any_text_comes_back(checkpoint: Path, text: str) -> None:
    tokenizer = _cached(checkpoint)
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)  # as Qwen2 does


def test_markers_are_one_token(tokenizer: Tokenizer) -> None:
    assert (
        tokenizer.decode([tokenizer.bos, *tokenizer.encode("a"), tokenizer.eos]) == "<|im_start|>a<|im_end|>"
    )
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos]


def test_markers_of_the_vocabulary_keep_their_ids(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "vocab.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["<|vision_end|>"] = len(vocabulary)
    path.write_text(json.dumps(vocabulary))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.end_of_image == vocabulary["<|vision_end|>"]
    assert len({tokenizer.bos, tokenizer.eos, tokenizer.start_of_image, tokenizer.end_of_image}) == 4


def test_save_is_complete_after_the_source_is_gone(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    tokenizer = Tokenizer.load(source)
    shutil.rmtree(source)
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").encode("a red mug") == tokenizer.encode("a red mug")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_missing_and_broken_files(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer: expected vocab\.json and merges\.txt"):
        Tokenizer.load(tmp_path)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match=r"vocab\.json: the tokenizer file cannot be read"):
        Tokenizer.load(tmp_path)


_CACHE: dict[Path, Tokenizer] = {}


def _cached(checkpoint: Path) -> Tokenizer:
    """One load for all of hypothesis's examples."""
    return _CACHE.setdefault(checkpoint, _CACHE.get(checkpoint) or Tokenizer.load(checkpoint))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("merges.txt", "#version: 0.2\n{\n", r"merges\.txt: line 2 is '{': must be two pieces"),
        ("merges.txt", "a b c\n", r"merges\.txt: line 1 is 'a b c'"),
        ("merges.txt", "a \u4e00\n", r"merges\.txt: line 1 is "),
        ("vocab.json", '{"a": "b"}', r"vocab\.json: the id of 'a' is 'b'"),
    ],
)
def test_files_that_do_not_make_a_tokenizer(
    checkpoint: Path, tmp_path: Path, name: str, content: str, said: str
) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        Tokenizer.load(tmp_path)
