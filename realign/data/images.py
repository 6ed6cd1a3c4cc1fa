"""Load a picture from an untrusted file: bounded in bytes and pixels, always 8-bit RGB, one clear error.

Rules: the first frame of an animation; EXIF orientation applied; transparency laid on white; 16-bit and
float pictures scaled to 8 bits; palettes, grey and CMYK converted.
"""

from __future__ import annotations

import hashlib
import io
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 40_000_000
MAX_BYTES = 512 * 2**20
# TIFF is left out: its library writes messages of its own to standard error.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")

# What Pillow's decoders raise on damaged files; a test that mutates files keeps the list honest.
DAMAGE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    MemoryError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Picture:
    """A picture in memory: `image` is 8-bit RGB, `sha256` is of the file's bytes."""

    image: Image.Image
    sha256: str


def load_picture(path: str | Path) -> Picture:
    """Read, check and convert the picture file `path`.

    Raises ValueError naming the file, what is wrong with it and how to mend it.
    """
    content = _read_bytes(Path(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = _decode(content, Path(path))
    return Picture(image, hashlib.sha256(content).hexdigest())


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB, transparent parts on white."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _read_bytes(path: Path) -> bytes:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"picture {str(path)!r} cannot be opened ({_reason(error)}); correct its path"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"picture {str(path)!r} is not a regular file; name a picture file")
    if status.st_size > MAX_BYTES:
        raise ValueError(
            f"picture {str(path)!r} has {status.st_size} bytes, more than {MAX_BYTES}; make it smaller"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"picture {str(path)!r} cannot be read ({_reason(error)}); check its permissions"
        ) from error


def _decode(content: bytes, path: Path) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            _check_pixels(opened.size, path)
            opened.load()
            return to_rgb(ImageOps.exif_transpose(opened))
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{str(path)!r} is not a picture that can be read ({kinds}); convert it") from error
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(path, "far too many")) from error
    except PixelLimitError:
        raise
    except DAMAGE_ERRORS as error:
        raise ValueError(f"picture {str(path)!r} is damaged ({_reason(error)}); replace the file") from error


class PixelLimitError(ValueError):
    """The picture's header claims more pixels than MAX_PIXELS."""


def _check_pixels(size: tuple[int, int], path: Path) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise PixelLimitError(_too_large(path, f"{width}x{height}"))


def _too_large(path: Path, count: str) -> str:
    return (
        f"picture {str(path)!r} has {count} pixels, more than {MAX_PIXELS // 10**6} million; make it smaller"
    )


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Scale a 16-bit, 32-bit or float grey picture to 8 bits (Pillow's own conversion clips at 255)."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=65535.0, neginf=0.0)
    top = values.max(initial=0.0)
    unit = 1.0 if image.mode == "F" else 255.0
    if image.mode.startswith("I;16") or top > 255.0:
        unit = 65535.0
    elif top > 1.0:
        unit = 255.0
    grey = np.clip(np.rint(values * (255.0 / unit)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:120]
