"""Pictures from files: every mode becomes 8-bit RGB, every damaged file one clear error."""

import hashlib
import io
import random
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from realign.data import images
from realign.data.images import load_picture

COLOURS = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def save(folder: Path, content: bytes, name: str = "picture") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def load_array(path: Path) -> np.ndarray:
    image = load_picture(path).image
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("format", ["PNG", "BMP", "PPM", "WEBP"])
def test_rgb_is_kept(tmp_path: Path, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    path = save(tmp_path, encode(Image.fromarray(COLOURS), format, **options))
    np.testing.assert_array_equal(load_array(path), COLOURS)


def test_the_hash_is_of_the_file(tmp_path: Path) -> None:
    content = encode(Image.fromarray(COLOURS), "PNG")
    assert load_picture(save(tmp_path, content)).sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_odd_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    path = save(
        tmp_path,
        encode(image, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 100} if mode == "CMYK" else {})),
    )
    expected = np.asarray(image.convert("RGB"), dtype=int)
    assert abs(load_array(path).astype(int) - expected).mean() < (20 if mode == "CMYK" else 0.01)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    """The left half is transparent, by an alpha channel or by a colour named transparent."""
    grey = np.full((8, 8), 60, dtype=np.uint8)
    grey[:, :4] = 200
    alpha = np.full((8, 8), 255, dtype=np.uint8)
    alpha[:, :4] = 0
    opaque = Image.fromarray(grey).convert("RGB" if mode == "RGB" else "L")
    options = {}
    if mode in ("RGBA", "LA", "PA"):
        image = Image.merge("LA", (opaque, Image.fromarray(alpha)))
        image = image if mode == "LA" else image.convert("RGBA")
    else:
        image = opaque.convert("P") if mode == "P" else opaque
        options = {"transparency": (200, 200, 200) if mode == "RGB" else 200}
    pixels = load_array(save(tmp_path, encode(image, "PNG", **options)))
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == 60).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    pixels = load_array(save(tmp_path, encode(Image.fromarray(deep), "PNG")))
    np.testing.assert_array_equal(pixels[..., 0], np.arange(256).reshape(16, 16))


def test_float_pictures_are_scaled() -> None:
    values = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    assert np.asarray(images.to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 128, 255, 0]
    assert np.asarray(images.to_rgb(Image.fromarray(values * 255)))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for format in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        content = encode(first, format, save_all=True, append_images=[second], **options)
        assert (load_array(save(tmp_path, content)) == (255, 0, 0)).all(), format


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    path = save(tmp_path, encode(image, "PNG", exif=exif))
    np.testing.assert_array_equal(load_array(path), np.rot90(COLOURS, -1))


def test_a_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 600)
    with pytest.raises(ValueError, match=r"'.*picture' has 31x24 pixels.*make it smaller"):
        load_picture(save(tmp_path, encode(Image.fromarray(COLOURS), "PNG")))


@pytest.mark.parametrize("side", [6_400, 14_000, 60_000])
def test_real_bombs_are_refused_without_decoding(tmp_path: Path, side: int) -> None:
    """A header alone may claim any size; Pillow warns from 89 and raises from 179 million pixels."""
    content = bytearray(encode(Image.new("1", (8, 8)), "PNG"))
    header = content[12:16] + side.to_bytes(4, "big") * 2 + content[24:29]
    content[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    with pytest.raises(ValueError, match="pixels, more than 40 million; make it smaller"):
        load_picture(save(tmp_path, bytes(content)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a picture"),
        (b"hello", "is not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a picture"),
        (encode(Image.fromarray(COLOURS), "PNG")[:400], "is damaged"),
        (encode(Image.fromarray(COLOURS), "JPEG")[:400], "is damaged"),
        (encode(Image.fromarray(COLOURS), "WEBP")[:100], "is not a picture|is damaged"),
    ],
    ids=["empty", "text", "postscript", "svg", "cut-png", "cut-jpeg", "cut-webp"],
)
def test_what_is_no_whole_picture_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_picture(save(tmp_path, content))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.png", tmp_path, Path("/dev/zero"), tmp_path / "a" / "b.png"):
        with pytest.raises(ValueError, match=r"cannot be opened|not a regular file"):
            load_picture(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="make it smaller"):
        load_picture(path)


def test_damaged_files_give_pictures_or_value_errors(tmp_path: Path) -> None:
    """Mutations of every format: what comes out is RGB or one line, never another exception."""
    rng = random.Random(0)
    picture = Image.fromarray(COLOURS)
    bases = [encode(picture, format) for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")]
    bases += [encode(picture.convert(mode), "PNG") for mode in ("P", "LA", "1")]
    bases.append(encode(picture, "JPEG", progressive=True, exif=_exif()))
    bases.append(encode(picture, "GIF", save_all=True, append_images=[picture.rotate(9)]))
    for _ in range(600):
        outcome = _mode_or_error(save(tmp_path, _mutate(rng, rng.choice(bases))))
        assert outcome == "RGB" or re.fullmatch(r".+; .+", outcome), outcome


def _mode_or_error(path: Path) -> str:
    try:
        return load_picture(path).image.mode
    except ValueError as error:
        return str(error)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _mutate(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 2, 8])):
        where = rng.randrange(min(len(changed), rng.choice([64, 10**9])))
        changed[where] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(changed[: rng.randrange(1, len(changed) + 1)] if rng.random() < 0.2 else changed)
