"""Prompt files: what is read, and that whatever is wrong is said in one line with file, line and mend."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from realign.data.readers import (
    MAX_SEED,
    PictureEntry,
    PromptError,
    TextEntry,
    load_references,
    read_prompts,
)

GENEVAL = {
    "tag": "single_object",
    "include": [{"class": "bench", "count": 1}],
    "prompt": "a photo of a bench",
}


def write(folder: Path, content: str | bytes, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def refuse(path: Path, format: str = "auto") -> tuple[int, str]:
    """The line number and text of the error."""
    with pytest.raises(PromptError) as caught:
        load_references(read_prompts(path, format))
    text = str(caught.value)
    found = re.fullmatch(re.escape(str(path)) + r":(\d+): (.+; .+)", text)
    assert found, text
    return int(found.group(1)), found.group(2)


def test_txt_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffa red star\r\n\n  une étoile\u2028rouge \n红星", "p.txt")
    entries = read_prompts(path).entries
    texts = [entry.parts[0].text for entry in entries]
    assert texts == ["a red star", "une étoile\u2028rouge", "红星"]
    assert [entry.id for entry in entries] == ["00000", "00001", "00002"]
    assert [entry.line for entry in entries] == [1, 3, 4]


def test_jsonl_reads_text_and_interleaved_prompts(tmp_path: Path) -> None:
    parts = [{"image": "refs/a.png"}, {"text": "on"}, {"image": "/b.png"}, {"text": "please"}]
    path = write(tmp_path, rows({"id": "one", "prompt": "a star"}, {"id": "two", "prompt": parts, "seed": 7}))
    one, two = read_prompts(path).entries
    assert (one.id, one.parts, one.seed) == ("one", (TextEntry("a star"),), None)
    assert two.seed == 7
    assert two.parts == (
        PictureEntry("refs/a.png", tmp_path / "refs/a.png"),
        TextEntry("on"),
        PictureEntry("/b.png", Path("/b.png")),
        TextEntry("please"),
    )


def test_geneval_keeps_its_lines(tmp_path: Path) -> None:
    line = json.dumps(GENEVAL, indent=None, separators=(",  ", ":"))
    prompts = read_prompts(write(tmp_path, f"{line}\r\n{line}\n\n"), "geneval")
    assert [entry.id for entry in prompts.entries] == ["00000", "00001"]
    assert [entry.source for entry in prompts.entries] == [line, line]
    assert prompts.entries[0].parts == (TextEntry("a photo of a bench"),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "prompt": "x", "sed": 1}, "unknown field 'sed'; the fields are id, prompt, seed"),
        ({"prompt": "x"}, "the field 'id' is missing"),
        ({"id": "a"}, "the field 'prompt' is missing"),
        ([1, 2], r"the line is '\[1, 2\]'; each line must be one JSON object"),
        ("text", "each line must be one JSON object"),
        (None, "each line must be one JSON object"),
        ({"id": 5, "prompt": "x"}, "'id' is '5'; it must be text"),
        ({"id": "a", "prompt": 5}, "it must be text or a list of parts"),
        ({"id": "a", "prompt": {"text": "x"}}, "it must be text or a list of parts"),
        ({"id": "a", "prompt": ""}, "a text is empty; write what to draw"),
        ({"id": "a", "prompt": " \n\t"}, "a text is empty"),
        ({"id": "a", "prompt": []}, "'prompt' is an empty list"),
        ({"id": "a", "prompt": ["x"]}, "a part is 'x'; it must be"),
        ({"id": "a", "prompt": [{}]}, "it must have either 'text' or 'image'"),
        ({"id": "a", "prompt": [{"text": "x", "image": "a.png"}]}, "it must have either 'text' or 'image'"),
        ({"id": "a", "prompt": [{"picture": "a.png"}]}, "it must have either 'text' or 'image'"),
        ({"id": "a", "prompt": [{"text": 5}]}, "'text' is '5'; it must be text"),
        ({"id": "a", "prompt": [{"image": None}]}, "'image' is 'null'; it must be text"),
        ({"id": "a", "prompt": [{"image": ""}]}, "name a picture file"),
        ({"id": "a", "prompt": [{"image": "a\0b"}]}, "name a picture file"),
        ({"id": "a", "prompt": [{"image": "a.png"}]}, "has pictures but no text"),
        ({"id": "a", "prompt": [{"image": "a.png"}, {"text": "x"}]}, "'.*a.png' cannot be opened"),
        ({"id": "a", "prompt": [{"image": "n\nl.png"}, {"text": "x"}]}, r"n\\nl.png' cannot be opened"),
        ({"id": "a", "prompt": "x", "seed": -1}, "'seed' is '-1'; it must be a whole number from 0"),
        ({"id": "a", "prompt": "x", "seed": 1.5}, "it must be a whole number"),
        ({"id": "a", "prompt": "x", "seed": True}, "it must be a whole number"),
        ({"id": "a", "prompt": "x", "seed": "1"}, "it must be a whole number"),
        ({"id": "a", "prompt": "x", "seed": MAX_SEED + 1}, "it must be a whole number"),
        (GENEVAL, "GenEval's metadata.*add --format geneval"),
    ],
)
def test_a_bad_row_is_refused(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path, rows({"id": "first", "prompt": "fine"}) + "\n" + rows(row))
    line, text = refuse(path)
    assert line == 3
    assert re.search(message, text), text


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../a", "a/b", "a\\b", "/etc/passwd", "a.", ".hidden", "-x", "a b", "a\nb", "a\0b", "~",
     "a:b", "con", "NUL", "com1.x", "x" * 201, "é" * 101, "a?", "a*", "\ud800"],
)  # fmt: skip
def test_ids_that_are_no_file_names_are_refused(tmp_path: Path, name: str) -> None:
    line, text = refuse(write(tmp_path, rows({"id": name, "prompt": "x"})))
    assert line == 1
    assert "id" in text


@pytest.mark.parametrize(
    "name", ["a", "0", "a.b-c_d", "x" * 200, "红星", "console", "a..b", "_", "00000.png"]
)
def test_ids_that_are_file_names_are_taken(tmp_path: Path, name: str) -> None:
    assert read_prompts(write(tmp_path, rows({"id": name, "prompt": "x"}))).entries[0].id == name


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("a", "a", "the id 'a' is on line 1 already; give"),
        ("Star", "sTAR", r"the ids 'sTAR' and 'Star' \(line 1\) are one file name on some systems"),
        ("straße", "STRASSE", "one file name"),
        ("\uff41", "a", "one file name"),
    ],
)
def test_ids_that_collide_are_refused(tmp_path: Path, first: str, second: str, message: str) -> None:
    line, text = refuse(write(tmp_path, rows(*({"id": i, "prompt": "x"} for i in (first, "other", second)))))
    assert line == 3
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ('{"id": "a", "prompt": "x"}\n{"id": "b", ', 2, "broken JSON at column"),
        ('{"id": "a", "prompt": "x"} {"id": "b"}', 1, r"broken JSON at column 28 \(Extra data\)"),
        ('{"id": "a", "id": "b", "prompt": "x"}', 1, "the field 'id' stands twice"),
        ('{"id": "a", "prompt": [{"text": "x", "text": "y"}]}', 1, "the field 'text' stands twice"),
        ('{"id": "a", "prompt": "x", "seed": NaN}', 1, "NaN is not JSON"),
        ('{"id": "a", "prompt": "x", "seed": ' + "9" * 5000 + "}", 1, "broken JSON"),
        ('{"id": "a", "prompt": ' + "[" * 200_000 + "}", 1, "nested too deeply"),
        ('{"id": "a", "prompt": "\\ud800 x"}', 1, "half a surrogate pair"),
        (b'{"id": "a", "prompt": "x"}\n{"id": "\xff"}', 2, "not UTF-8 .byte 0xff at column 9"),
        ('{"id": "a", "prompt": "x"}'.encode("utf-16"), 1, "not UTF-8"),
        ("", 1, "the file has no prompts"),
        (" \n\r\n\n", 1, "the file has no prompts"),
    ],
    ids=["cut", "two", "twice", "twice-in-part", "nan", "digits", "deep", "surrogate", "latin-1", "utf-16",
         "empty", "blank"],
)  # fmt: skip
def test_broken_files_are_refused(tmp_path: Path, content: str | bytes, line: int, message: str) -> None:
    found, text = refuse(write(tmp_path, content))
    assert found == line
    assert re.search(message, text), text
    assert len(text) < 300


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GENEVAL, "prompt": ""}, "a text is empty"),
        ({**GENEVAL, "prompt": [{"text": "x"}]}, "GenEval's prompts are text"),
        ({**GENEVAL, "exlude": []}, "unknown field 'exlude'"),
        ({**GENEVAL, "exclude": 1}, "'exclude' is '1'; it must be a list"),
        ({**GENEVAL, "tag": 1}, "'tag' is '1'; it must be text"),
        ({"id": "a", "prompt": "x"}, "unknown field 'id'"),
    ],
)
def test_bad_geneval_rows_are_refused(tmp_path: Path, row: object, message: str) -> None:
    line, text = refuse(write(tmp_path, rows(GENEVAL, row)), "geneval")
    assert line == 2
    assert re.search(message, text), text


def test_a_blank_line_inside_geneval_is_refused(tmp_path: Path) -> None:
    line, text = refuse(write(tmp_path, rows(GENEVAL) + "\n" + rows(GENEVAL)), "geneval")
    assert line == 2
    assert "broken JSON" in text


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "cannot be read (No such file" in refuse(tmp_path / "absent.txt")[1]
    assert "not a regular file" in refuse(tmp_path)[1]
    assert "tells no format" in refuse(write(tmp_path, "x", "prompts.csv"))[1]
    assert "unknown format 'csv'" in refuse(write(tmp_path, "x", "prompts.txt"), "csv")[1]


def test_references_are_opened_once_and_hashed(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    prompt = [{"image": "a.png"}, {"text": "x"}, {"image": "a.png"}]
    prompts = read_prompts(
        write(tmp_path, rows({"id": "a", "prompt": prompt}, {"id": "b", "prompt": prompt}))
    )
    assert list(load_references(prompts)) == [tmp_path / "a.png"]
    (tmp_path / "a.png").write_bytes(b"not a picture")
    assert refuse(prompts.path) == (1, f"'{tmp_path}/a.png' is not a picture that can be read "
                                       "(PNG, JPEG, WEBP, GIF, BMP, PPM); convert it")  # fmt: skip


def test_the_hash_tells_files_apart(tmp_path: Path) -> None:
    one = read_prompts(write(tmp_path, "a\n", "a.txt")).sha256
    assert one == read_prompts(write(tmp_path, "a\n", "b.txt")).sha256
    assert one != read_prompts(write(tmp_path, "a", "c.txt")).sha256


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["id", "prompt", "seed", "text", "image", "x"]), inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_content_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = write(tmp_path_factory.getbasetemp(), content, "any.jsonl")
    for format in ("txt", "jsonl", "geneval"):
        error = _error_of(path, format)
        assert error is None or re.fullmatch(re.escape(str(path)) + r":\d+: .+; .+", error), error


def _error_of(path: Path, format: str) -> str | None:
    try:
        load_references(read_prompts(path, format))
    except PromptError as error:
        return str(error)
    return None
