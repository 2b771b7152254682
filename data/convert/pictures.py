"""Pictures that a dataset takes: bytes as they lie somewhere, of a kind and size that training can decode."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

from PIL import Image

from ..messages import first_line

MOST_BYTES = 64 << 20
"""Most bytes of one picture; nothing larger is read."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What Pillow may take a picture for; its other readers are seldom used, and one of them starts a program."""


class Unusable(Exception):
    """(reason, detail) of what cannot be taken: kind of fault in a few words, and what is wrong in one line."""


def checked(encoded: bytes) -> bytes:
    """The bytes, if they are a picture; it is not decoded, only looked through.

    Raises:
        Unusable: they are none, or it would decode to more pixels than Pillow's limit (``Image.MAX_IMAGE_PIXELS``).
    """
    if len(encoded) > MOST_BYTES:
        raise too_large(len(encoded))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
                picture.verify()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unusable("decompression bomb", f"has too many pixels ({first_line(error)})") from error
    except Exception as error:  # decoders fail in many ways
        raise Unusable("unreadable picture", f"does not decode ({_without_object(error)})") from error
    return encoded


def picture_file(path: Path) -> bytes:
    """A file's bytes, if they are a picture.

    Raises:
        Unusable: see :func:`file_bytes` and :func:`checked`.
    """
    return checked(file_bytes(path))


def file_bytes(path: Path) -> bytes:
    """A file's bytes, unchecked.

    Raises:
        Unusable: there is no such file, it is too large, or it cannot be read.
    """
    try:
        if not path.is_file():  # a pipe, for one, would keep us waiting
            raise Unusable("missing picture", "no such file in the picture folder")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise too_large(size)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise Unusable("unreadable picture", f"cannot be read ({why})") from error


def too_large(size: int) -> Unusable:
    """What to say of a picture that is not read for its size."""
    return Unusable("large picture", f"has {size / 2**20:.0f} MiB, a picture at most {MOST_BYTES >> 20}")


def _without_object(error: Exception) -> str:
    """PIL names the buffer it read from by its address in memory, which differs each time."""
    return first_line(error).partition(" <_io.BytesIO")[0]
