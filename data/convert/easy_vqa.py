"""easy-VQA: 5,000 pictures of one coloured shape with 48,248 questions, from the package ``easy-vqa`` (MIT).

One record is one picture with all its questions, which are independent of each other: "what is the red
shape?" would else answer "what color is the shape?".

=======  ========================================  =========================================================
kind     questions of train / test                 note
=======  ========================================  =========================================================
colour   5,166 / 1,280                             8 answers; the question may name the shape
shape    5,002 / 1,257                             3 answers; the question may name the colour
yesno    28,407 / 7,136                            negated ones too; 83 % right without looking, so never
                                                   report it alone
=======  ========================================  =========================================================
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...models.errors import UserError, nearest
from ...models.packaged import packaged_file
from ..schema import IMAGE_MARK, pack_images
from ..sentences import SIDECAR, dataset_hash
from ..shards import write_shards

SPLITS = ("train", "test")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

_KINDS = (
    ("yesno", re.compile(r"(is|does) "), ("no", "yes")),
    ("colour", re.compile(r"what (color is|is the color of) the "), COLOURS),
    ("shape", re.compile(rf"what (shape |is the ({'|'.join(COLOURS)}) shape)"), SHAPES),
)


def question_kind(question: str, answer: str) -> str:
    """``"colour"``, ``"shape"`` or ``"yesno"``, by the question's words.

    Raises:
        ValueError: no known form, or an answer that the form cannot have.
    """
    for kind, form, answers in _KINDS:
        if form.match(question):
            if answer not in answers:
                raise ValueError(f"'{answer}' does not answer '{question}'")
            return kind
    raise ValueError(f"no known form of question: '{question}'")


def read(split: str, *, yesno: int | None = None) -> Iterator[dict[str, Any]]:
    """Records of one split, in the order of the pictures' numbers, questions in the order of the file.

    Args:
        split: ``"train"`` (4,000 pictures, 38,575 questions) or ``"test"`` (1,000 and 9,673).
        yesno: keep the first so many yes/no questions of each picture; default: all. They are three quarters
            of the tokens and teach the least.

    Yields:
        One value for each of :data:`opsin.data.schema.COLUMNS`.
        ``meta`` is ``{"source", "split", "turns": "independent", "kinds": [one an exchange]}``.

    Raises:
        UserError: no such split, or the package ``easy-vqa`` is missing.
    """
    if split not in SPLITS:
        raise UserError(f"easy-vqa has no split '{split}'{nearest(split, SPLITS)}")
    folder = packaged_file("easy_vqa", f"data/{split}", install="opsin[real]")
    exchanges: dict[int, list[tuple[str, str]]] = {}
    for question, answer, picture in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        exchanges.setdefault(picture, []).append((question, answer))
    for picture in sorted(exchanges):
        kinds = [question_kind(*exchange) for exchange in exchanges[picture]]
        kept = _kept(kinds, yesno)
        yield {
            "id": f"easy-vqa-{split}-{picture:04d}",
            "conversations": _conversation([exchanges[picture][i] for i in kept]),
            "images": pack_images([(folder / "images" / f"{picture}.png").read_bytes()]),
            "meta": {
                "source": "easy-vqa",
                "split": split,
                "turns": "independent",
                "kinds": [kinds[i] for i in kept],
            },
        }


def write(
    out: str | Path,
    split: str,
    *,
    yesno: int | None = None,
    limit: int | None = None,
    size_limit: int = 1 << 26,
) -> int:
    """Write one split as MDS shards, with the counts of its instruction sentences beside them.

    Args:
        out: folder, new or empty.
        split: ``"train"`` or ``"test"``.
        yesno: see :func:`read`.
        limit: number of records; default: all.
        size_limit: most bytes in a shard.

    Returns:
        The number of records written.

    Raises:
        UserError: no such split, missing package, or ``out`` holds something already.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: give another folder, or remove it")
    records = list(itertools.islice(read(split, yesno=yesno), limit))
    counts, index = write_shards(str(out), iter(records), size_limit)
    counts.dataset = dataset_hash(index)
    counts.save(out / SIDECAR)
    return len(records)


def _kept(kinds: list[str], yesno: int | None) -> list[int]:
    """Indices of the questions to keep."""
    every = [i for i, kind in enumerate(kinds) if kind == "yesno"]
    dropped = set() if yesno is None else set(every[yesno:])
    return [i for i in range(len(kinds)) if i not in dropped]


def _conversation(exchanges: list[tuple[str, str]]) -> list[dict[str, str]]:
    turns = []
    for question, answer in exchanges:
        mark = "" if turns else f"{IMAGE_MARK}\n"
        turns.append({"from": "human", "value": f"{mark}{question}"})
        turns.append({"from": "gpt", "value": answer})
    return turns
