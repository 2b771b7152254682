"""Small copies of pictures as ``data:`` URIs, each distinct picture once."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass

from PIL import Image

from ...models.errors import UserError

SIDE = 224
"""Longest side of a copy, pixels."""

QUALITY = 82
"""Of JPEG copies."""


@dataclass(frozen=True)
class Thumbnail:
    """A copy of a picture.

    Attributes:
        uri: ``data:image/png;base64,...``.
        size: (width, height) in which it is shown, pixels.
        shown_as: ``pixels`` for small pictures, which are shown enlarged with every pixel a square; else ``photo``.
        original: (width, height) of the picture.
    """

    uri: str
    size: tuple[int, int]
    shown_as: str
    original: tuple[int, int]


class Thumbnails:
    """Makes each distinct picture's copy once, and knows under which number."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self.made: list[Thumbnail] = []

    def number(self, encoded: bytes) -> int:
        """Index into ``made`` of a picture's copy.

        Raises:
            UserError: it cannot be decoded.
        """
        key = hashlib.sha256(encoded).digest()
        if key not in self._numbers:
            self.made.append(thumbnail(encoded))
            self._numbers[key] = len(self.made) - 1
        return self._numbers[key]


def thumbnail(encoded: bytes) -> Thumbnail:
    """A copy no larger than ``SIDE``, as the model gets it (RGB, not turned), without its metadata.

    A picture that is not made smaller stays exact (PNG) unless JPEG takes less than half the room: artefacts would show in
    enlarged pixels. Else the smaller of the two is taken.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as opened:
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"picture cannot be read: {error}".split(" <", 1)[0]) from error
    original, scale = picture.size, SIDE // max(picture.size)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    forms = {
        "png": _encoded(picture, "PNG", optimize=True),
        "jpeg": _encoded(picture, "JPEG", quality=QUALITY),
    }
    worth = 2 if picture.size == original else 1
    kind = "jpeg" if len(forms["jpeg"]) * worth < len(forms["png"]) else "png"
    width, height = picture.size
    return Thumbnail(
        f"data:image/{kind};base64,{base64.b64encode(forms[kind]).decode()}",
        (width * max(scale, 1), height * max(scale, 1)),
        "pixels" if scale > 1 else "photo",
        original,
    )


def png_uri(png: bytes) -> str:
    """A ready PNG as it is."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _encoded(picture: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()
