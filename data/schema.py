"""How one sample is stored: the columns of Opsin's MDS shards, and nothing else.

A sample is a conversation about zero or more pictures, kept raw: text is tokenised and pictures are
resized while training, because both depend on the model. Pictures keep their original encoded bytes
(JPEG, PNG, WebP), so writing never loses anything.

========================  =======  =====================================================================
column                    type     meaning
========================  =======  =====================================================================
``id``                    str      unique within its dataset
``conversations``         json     LLaVA's list: ``{"from": "human"|"gpt"|"system", "value": str}``;
                                   ``<image>`` marks where a picture stands
``images``                bytes    :func:`pack_images`: 0..n encoded pictures, in order of their marks
``meta``                  json     free: question kinds, split, source ...; Opsin reads ``turns`` and
                                   ``kinds`` when they are there (see ``data/encode.py``)
``patch_targets``         bytes    optional, here or in a dataset of its own beside this one: targets of each
                                   patch of each picture (``data/patch_targets.py``)
========================  =======  =====================================================================
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

IMAGE_MARK = "<image>"
"""Where a picture stands in the text of a stored conversation, whatever the model's own token is called."""

COLUMNS: dict[str, str] = {"id": "str", "conversations": "json", "images": "bytes", "meta": "json"}
"""MDS column name -> encoding, for ``streaming.MDSWriter(columns=COLUMNS)``."""

HASHES = ("sha1", "xxh64")
"""Hashes written for every shard; ``xxh64`` is the one checked while streaming (nearly free)."""

IGNORE_INDEX = -100
"""Label of a token that is not to be predicted, as in PyTorch and Hugging Face."""


class Role(IntEnum):
    """What a token is, by its place in the conversation (``roles`` of the batch)."""

    PAD = 0
    SYSTEM = 1
    """The system prompt."""
    MARKER = 2
    """Template text: BOS, role names, separators, end of the user's turn."""
    IMAGE = 3
    """A visual token, or a token that belongs to an image's layout (newline, tile separator)."""
    INSTRUCTION = 4
    """What the user wrote."""
    RESPONSE = 5
    """What the assistant wrote, and the token that ends it."""


def pack_images(encoded: Sequence[bytes]) -> bytes:
    """Pack encoded pictures into one value: uint32 count, uint32 length of each, then the bytes (little endian).

    Args:
        encoded: 0..n pictures as they lie on disk (JPEG, PNG, WebP ...).
    """
    head = struct.pack(f"<{1 + len(encoded)}I", len(encoded), *(len(e) for e in encoded))
    return head + b"".join(encoded)


def unpack_images(packed: bytes) -> list[bytes]:
    """Undo :func:`pack_images`.

    Raises:
        ValueError: the lengths do not add up to the value's size.
    """
    if len(packed) < 4:
        raise ValueError(f"packed images need at least 4 bytes, got {len(packed)}")
    (count,) = struct.unpack_from("<I", packed)
    if len(packed) < 4 + 4 * count:
        raise ValueError(f"packed images name {count} pictures but hold only {len(packed)} bytes")
    lengths = struct.unpack_from(f"<{count}I", packed, 4)
    start = 4 + 4 * count
    if start + sum(lengths) != len(packed):
        raise ValueError(f"packed images should have {start + sum(lengths)} bytes, got {len(packed)}")
    pictures = []
    for length in lengths:
        pictures.append(packed[start : start + length])
        start += length
    return pictures


def pack_ids(names: Sequence[str], most: int = 200) -> np.ndarray:
    """Ids as numbers, to travel in a batch: (N, W) uint8, UTF-8 with zeros behind; long ones are cut after ``most`` bytes."""
    encoded = [name.encode("utf-8", "surrogatepass")[:most] for name in names]
    out = np.zeros((len(names), max(map(len, encoded), default=0)), np.uint8)
    for row, name in zip(out, encoded, strict=True):
        row[: len(name)] = np.frombuffer(name, np.uint8)
    return out


def id_of(packed: Sequence[int]) -> str:
    """Undo :func:`pack_ids` for one row."""
    return bytes(packed).rstrip(b"\0").decode("utf-8", "replace")


def stable_hash(*parts: object) -> int:
    """Hash of the parts' text that never changes between runs, machines and versions: 1 .. 2**63 - 1.

    Used for ``document_uid`` and ``sentence_ids``; 0 is kept free for "none".
    """
    digest = hashlib.blake2b(
        "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=8
    ).digest()
    return (int.from_bytes(digest, "little") & (2**63 - 1)) or 1
