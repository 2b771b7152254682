"""Items of a JSON list or of JSON lines, with their places in the file, so that each can be read alone later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ...models.errors import UserError
from ..messages import first_line

_SPACE = " \t\r\n"


def json_items(content: bytes, file: str) -> Iterator[tuple[int, int, Any]]:
    """Items of a file with the places of their first byte and behind their last one.

    Args:
        content: JSON list, or one object a line; UTF-8, with or without a byte order mark.
        file: its name, for messages.

    Raises:
        UserError: it is neither.
    """
    body = content.removeprefix(b"\xef\xbb\xbf")
    shift = len(content) - len(body)
    head = body.lstrip()[:1]
    if head not in (b"[", b"{"):
        raise UserError(f"{file}: neither a JSON list of samples nor one sample a line")
    if head == b"{":
        start = shift
        for number, line in enumerate(body.split(b"\n"), 1):
            if line.strip():
                try:
                    yield start, start + len(line), json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{file}: line {number} is no JSON ({first_line(error)})") from error
            start += len(line) + 1
        return
    try:
        yield from _list_items(body.decode(), shift)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: no JSON list ({first_line(error)})") from error


def _list_items(text: str, shift: int) -> Iterator[tuple[int, int, Any]]:
    """Items of a JSON list, without holding all of them; places are in bytes of UTF-8, from ``shift`` on."""
    decode, plain = json.JSONDecoder().raw_decode, text.isascii()
    at = _skip(text, text.index("[") + 1)
    counted, place = 0, shift  # characters, and the bytes that they are
    if text[at : at + 1] == "]":
        return
    while True:
        item, end = decode(text, at)
        place += at - counted if plain else len(text[counted:at].encode())
        size = end - at if plain else len(text[at:end].encode())
        yield place, place + size, item
        counted, place = end, place + size
        at = _skip(text, end)
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                raise json.JSONDecodeError("Extra data", text, at + 1)
            return
        if text[at : at + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in _SPACE:
        at += 1
    return at
