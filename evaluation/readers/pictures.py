"""Pictures of a question file: names in a folder of pictures, or bytes that the file itself holds; read when needed."""

from __future__ import annotations

import ast
import base64
import binascii
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ...data.messages import first_line
from ...models.errors import UserError
from ..records import Picture
from .addresses import PICTURE_SECONDS, cached_folder, download, is_remote, joined

Stored = str | Picture
"""A picture as a row names it: a name in the folder of pictures, or a function that reads the file's own bytes."""

LONGEST_NAME = 64
"""The shortest PNG has more characters than this in base64. (VLMEvalKit writes another row's index in place of a picture
that has been written before.)"""


@dataclass(frozen=True)
class FolderPicture:
    """A picture in a folder, read when it is called; a remote one is fetched then, once.

    Attributes:
        folder: path or URL.
        name: path in it, with ``/``.
        where: row that names it, for messages.

    Raises:
        UserError: the name leaves the folder.
    """

    folder: str
    name: str
    where: str

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)
        if (
            path.is_absolute()
            or ".." in path.parts
            or not path.parts
            or "\0" in self.name
            or "\\" in self.name
        ):
            raise UserError(
                f"{self.where}: picture '{self.name}': leads out of the folder of pictures, or is no path with '/'"
            )

    def __call__(self) -> bytes:
        """The picture's bytes.

        Raises:
            UserError: it cannot be read, or is none.
        """
        path = str(PurePosixPath(self.name))
        file = Path(joined(self.folder, path))
        if is_remote(self.folder):
            file = cached_folder(self.folder) / path
            if not file.is_file():
                try:
                    download(joined(self.folder, path), file, PICTURE_SECONDS)
                except UserError as error:
                    raise type(error)(f"{self.where}: {error}") from error
        try:
            encoded = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.where}: picture {file} cannot be read ({error.strerror or error})"
            ) from error
        return checked(encoded, f"{self.where}: {file}")


def pictures_of(stored: Sequence[Stored], folder: str, where: str) -> tuple[Picture, ...]:
    """What a row has in a column of pictures, as functions that read them.

    Args:
        stored: value of the column.
        folder: where named pictures lie.
        where: row, for messages.
    """
    return tuple(FolderPicture(folder, one, where) if isinstance(one, str) else one for one in stored)


def check_pictures(pictures: Iterable[Picture]) -> None:
    """Look for pictures in local folders before any question is asked; none is opened.

    Raises:
        UserError: no such folder, or it lacks some.
    """
    wanted: dict[str, dict[str, FolderPicture]] = {}
    for picture in pictures:
        if isinstance(picture, FolderPicture) and not is_remote(picture.folder):
            wanted.setdefault(picture.folder, {}).setdefault(picture.name, picture)
    for address, named in wanted.items():
        folder, first = Path(address).expanduser(), next(iter(named.values()))
        if not folder.is_dir():
            raise UserError(f"images: {address}: no such folder; {first.where} names '{first.name}' in it")
        missing = [picture for name, picture in named.items() if not (folder / name).is_file()]
        if missing:
            count = f"{len(missing)} of {len(named)} pictures are missing"
            raise UserError(f"images: {address}: has no '{missing[0].name}' of {missing[0].where} ({count})")


def checked(encoded: bytes, where: str) -> bytes:
    """The bytes, if they are a picture's.

    Raises:
        UserError: they are not.
    """
    try:
        with Image.open(io.BytesIO(encoded)):
            return encoded
    except Exception as error:  # decoders fail in many ways
        why = first_line(error).partition(" <_io.BytesIO")[0]
        raise UserError(f"{where}: is no picture ({why})") from error


def in_text(value: Any, again: Callable[[], Any], where: str) -> list[Stored]:
    """Pictures in a value of a text file: a name, base64 (also as a ``data:`` URL), or a list of them; none: ``[]``.

    Args:
        value: as read.
        again: reads the same value once more, so that base64 need not be kept.
        where: row and column, for messages.

    Raises:
        UserError: it is nothing of that kind.
    """
    return [
        part if _is_name(part) else partial(_decoded, again, at, where)
        for at, part in enumerate(_parts(value, where))
    ]


def _is_name(part: str) -> bool:
    return not part.startswith("data:") and ("." in part or len(part) <= LONGEST_NAME)  # base64 has no "."


def _parts(value: Any, where: str) -> list[str]:
    if value is None or value == "":
        return []
    if isinstance(value, str) and value[0] == "[" and value[-1] == "]":
        value = _list(value, where)
    parts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(part, str) and part for part in parts):
        raise UserError(f"{where}: is neither a name of a picture nor base64, nor a list of them")
    return list(parts)


def _list(text: str, where: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # as JSON, or as Python prints a list of texts
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise UserError(f"{where}: starts as a list and is none")


def _decoded(again: Callable[[], Any], at: int, where: str) -> bytes:
    part = _parts(again(), where)[at]
    if part.startswith("data:"):
        part = part.partition(",")[2]
    try:
        encoded = base64.b64decode("".join(part.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: is no base64 ({first_line(error)})") from error
    return checked(encoded, where)
