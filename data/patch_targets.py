"""Targets that were computed once and stored: for each patch of each picture a vector, as a column of samples.

A frozen function (an auto-encoder, a vision model) that a method learns to predict costs the same in every
epoch; ``opsin data latents`` applies it once. What is stored belongs to the picture's bytes, to the function
and to the model's way of cutting pictures into patches; all three are checked when it is read.

Column ``patch_targets`` of one sample, little endian: ``OPT1``, uint32 M, uint32 pictures; for each picture
the 8-byte hash of its encoded bytes, uint32 views, and for each view uint32 rows and uint32 columns; then for
each picture its values, (patches of all views, M) bfloat16 in order of the views, row by row. A picture that
could not be read has no views.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.errors import UserError
from ..models.geometry import EncodedImage, geometry_id

COLUMN = "patch_targets"
"""Name of the column, and key of a sample and of a batch."""

DESCRIPTION = "patch_targets.json"
"""File beside ``index.json`` that says what the column holds."""

STORED = ("auto", "required", "ignore")
"""What a method may be told to do with stored targets; see :func:`use_stored`."""

LATENTS = "opsin data latents"
"""The command that makes stored targets; a method may have one of its own."""

_MAGIC = b"OPT1"
_FORMAT = "opsin.patch_targets/1"


@dataclass
class PictureTargets:
    """Stored targets of one picture.

    Attributes:
        picture: :func:`picture_hash` of its encoded bytes.
        grids: (rows, columns) of each view; none: the picture could not be read.
        values: (patches of all views, M) bfloat16.
    """

    picture: bytes
    grids: tuple[tuple[int, int], ...]
    values: torch.Tensor


def picture_hash(encoded: bytes) -> bytes:
    """8 bytes that name a picture by its encoded bytes."""
    return hashlib.blake2b(encoded, digest_size=8).digest()


def pack(pictures: Sequence[PictureTargets], width: int) -> bytes:
    """Targets of a sample's pictures, ``width`` (M) values a patch, as stored."""
    head, body = [_MAGIC, struct.pack("<2I", width, len(pictures))], []
    for one in pictures:
        patches = sum(rows * columns for rows, columns in one.grids)
        if one.values.shape != (patches, width) or one.values.dtype != torch.bfloat16:
            raise ValueError(f"targets {tuple(one.values.shape)} {one.values.dtype} for {patches} patches")
        flat = [side for grid in one.grids for side in grid]
        head.append(one.picture + struct.pack(f"<{1 + len(flat)}I", len(one.grids), *flat))
        body.append(one.values.contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes())
    return b"".join(head + body)


def unpack(packed: bytes) -> list[PictureTargets]:
    """Undo :func:`pack`.

    Raises:
        ValueError: not what :func:`pack` makes, or only a part of it.
    """
    try:
        if packed[:4] != _MAGIC:
            raise ValueError("another format")
        width, count = struct.unpack_from("<2I", packed, 4)
        if not width:
            raise ValueError("0 values a patch")
        at, heads = 12, []
        for _ in range(count):
            name, views = struct.unpack_from("<8sI", packed, at)
            if views > len(packed):  # before Python makes a format of four billion letters
                raise ValueError(f"{views} views in {len(packed)} bytes")
            sides = struct.unpack_from(f"<{2 * views}I", packed, at + 12)
            at += 12 + 8 * views
            heads.append((name, tuple(zip(sides[::2], sides[1::2], strict=True))))
    except struct.error as error:
        raise ValueError(f"stored targets are cut off ({error})") from error
    except ValueError as error:
        raise ValueError(f"no stored targets: {error}") from error
    patches = [sum(rows * columns for rows, columns in grids) for _, grids in heads]
    if at + 2 * width * sum(patches) != len(packed):
        raise ValueError(
            f"stored targets should have {at + 2 * width * sum(patches)} bytes, got {len(packed)}"
        )
    values = torch.zeros(0, dtype=torch.bfloat16)
    if at < len(packed):
        values = torch.frombuffer(bytearray(packed[at:]), dtype=torch.bfloat16)
    values = values.reshape(sum(patches), width)
    return [
        PictureTargets(name, grids, part)
        for (name, grids), part in zip(heads, values.split(patches) if patches else [], strict=True)
    ]


def attach(sample: Mapping[str, Any], encoded: Sequence[bytes], images: Sequence[EncodedImage]) -> None:
    """Give pictures of a sample their stored targets, if it has any.

    Args:
        sample: as the dataset gives it.
        encoded: the bytes of its first pictures.
        images: those pictures as the model takes them.

    Raises:
        UserError: they are targets of other pictures, or of pictures cut into other patches.
    """
    packed = sample.get(COLUMN)
    if packed is None:
        return
    name = f"sample '{sample['id']}': stored {COLUMN}"
    try:
        stored = unpack(packed)
    except ValueError as error:
        raise UserError(f"{name} cannot be used: {error}") from error
    if len(stored) < len(images):
        raise UserError(f"{name} are those of {len(stored)} pictures, it shows {len(images)}")
    for i, (data, image, targets) in enumerate(zip(encoded, images, stored, strict=False)):
        if targets.picture != picture_hash(data):
            raise UserError(f"{name} of picture {i} were made for another picture")
        grids = tuple(view.grid for view in image.views)
        if targets.grids != grids:
            raise UserError(
                f"{name} of picture {i} were made for another geometry: {_grids(targets.grids)} patches, this model "
                f"has {_grids(grids)}; make them anew (the command stands in {DESCRIPTION}), or set dataset.{COLUMN}: "
                f"ignore"
            )
        image.patch_targets = targets.values


def _grids(grids: Sequence[tuple[int, int]]) -> str:
    return " + ".join(f"{rows}x{columns}" for rows, columns in grids) or "no"


def stacked(images: Sequence[EncodedImage]) -> torch.Tensor | None:
    """Targets of all patches of all views of a batch, (P, M) bfloat16; None where pictures have none.

    Raises:
        UserError: some pictures have targets and some have not, or they are of different kinds.
    """
    have = [image.patch_targets for image in images if image.patch_targets is not None]
    if not have:
        return None
    if len(have) < len(images):
        raise UserError(
            f"dataset: {len(images) - len(have)} of a batch's {len(images)} pictures have no stored {COLUMN}, the "
            f"others have; give every stream its own, or set dataset.{COLUMN}: ignore"
        )
    widths = sorted({values.shape[1] for values in have})
    if len(widths) > 1:
        raise UserError(f"dataset: stored {COLUMN} of one batch have {widths} values a patch; use one kind")
    return torch.cat(have)


@dataclass(frozen=True)
class PatchTargetsInfo:
    """What a dataset's column ``patch_targets`` holds (the file :data:`DESCRIPTION`).

    Attributes:
        name: the method whose targets they are.
        identity: of the function that made them (its kind, settings and weights).
        geometry: ``models.geometry.geometry_id`` of the model whose patches they describe.
        moments_dim: M, values a patch.
        dataset: hash of the index of the dataset whose pictures they describe.
        samples: number of samples.
        index: hash of the index that this file lies beside.
        command: how they were made.
    """

    name: str
    identity: str
    geometry: str
    moments_dim: int
    dataset: str
    samples: int
    index: str = ""
    command: str = ""

    @property
    def kind(self) -> tuple[str, str, str, int]:
        """What must be equal where several streams are mixed."""
        return self.name, self.identity, self.geometry, self.moments_dim

    @property
    def made_with(self) -> str:
        """The command that made them, without its arguments."""
        words = self.command.split()[:3]
        return " ".join(words) if words[:2] == ["opsin", "data"] else LATENTS

    def dumps(self) -> str:
        """As text of the file."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> PatchTargetsInfo:
        """Read the file.

        Raises:
            ValueError: it is no such file.
        """
        try:
            body = json.loads(Path(path).read_text(encoding="utf-8"))
            if body.pop("format") != _FORMAT:
                raise ValueError("another format")
            return cls(**body)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a description of stored targets ({error})") from error


def use_stored(
    loader: Any, name: str, stored: str, identity: str, where: str, command: str = LATENTS
) -> bool:
    """Whether a method takes the targets that its batches bring along (under the key :data:`COLUMN`).

    Args:
        loader: the training loader: its ``dataset.patch_targets_info`` says what is stored, its ``collate_fn`` how
            the model cuts pictures.
        name: of the method; another method's targets are not taken.
        stored: ``auto`` takes them, ``required`` stops without them, ``ignore`` computes them anyway.
        identity: of the method's own function.
        where: the method's place in the configuration, as ``algorithms.ross``.
        command: that makes its targets.

    Returns:
        False where there are none, or none of this method's, or they are to be ignored.

    Raises:
        UserError: they are required and there are none, or they were made by another function or for another
            geometry.
    """
    info = getattr(getattr(loader, "dataset", None), "patch_targets_info", None)
    if info is None or info.name != name:
        if stored == "required":
            raise UserError(f"{where}.stored: the dataset brings no targets; make them with `{command}`")
        return False
    if stored == "ignore":
        return False
    check(info, identity, geometry_id(loader.collate_fn.encoder.images), f"{where}.target", command)
    return True


def check(info: PatchTargetsInfo, identity: str, geometry: str, where: str, command: str = LATENTS) -> None:
    """Refuse stored targets that are not what a method would compute itself.

    Args:
        info: what the dataset holds.
        identity: of the method's own function.
        geometry: ``models.geometry.geometry_id`` of the model that is trained.
        where: key of the configuration, for the message.
        command: that makes them, for the message.

    Raises:
        UserError: made by another function, or for another geometry; the line names both.
    """
    if info.identity != identity:
        raise UserError(
            f"{where}: the dataset's stored {COLUMN} were made by '{info.identity}', this is '{identity}'; make them "
            f"anew with `{command}`, or set dataset.{COLUMN}: ignore"
        )
    if info.geometry != geometry:
        ours, theirs = geometry.split("; "), info.geometry.split("; ")
        raise UserError(
            f"{where}: the dataset's stored {COLUMN} were made for another geometry: "
            f"'{_only(theirs, ours)}', this model has '{_only(ours, theirs)}'; make them anew with "
            f"`{command}`, or set dataset.{COLUMN}: ignore"
        )


def _only(one: Sequence[str], other: Sequence[str]) -> str:
    """What is in one list alone."""
    return "; ".join(part for part in one if part not in other)
