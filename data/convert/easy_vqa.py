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

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...models.errors import UserError, nearest
from ...models.packaged import packaged_file
from ..schema import IMAGE_MARK, pack_images
from ..write import write_dataset

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


class EasyVQASource:
    """Records of one split, by the order of the pictures' numbers; see :func:`read`.

    Args:
        split: ``"train"`` or ``"test"``.
        yesno: see :func:`read`.
        limit: number of records; default: all.

    Raises:
        UserError: no such split, or the package ``easy-vqa`` is missing.
    """

    at_once = 64

    def __init__(self, split: str, *, yesno: int | None = None, limit: int | None = None):
        if split not in SPLITS:
            raise UserError(f"easy-vqa has no split '{split}'{nearest(split, SPLITS)}")
        if limit is not None and limit < 1:
            raise UserError(f"limit: at least 1, got {limit}")
        self.split, self.yesno = split, yesno
        self._folder = packaged_file("easy_vqa", f"data/{split}", install="opsin[real]")
        self._exchanges: dict[int, list[tuple[str, str]]] = {}
        text = (self._folder / "questions.json").read_text(encoding="utf-8")
        for question, answer, picture in json.loads(text):
            self._exchanges.setdefault(picture, []).append((question, answer))
        self._pictures = sorted(self._exchanges)[:limit]

    def __len__(self) -> int:
        return len(self._pictures)

    def records(self, first: int, end: int) -> Iterator[dict[str, Any]]:
        """Records ``first`` .. ``end`` - 1."""
        for picture in self._pictures[first:end]:
            exchanges = self._exchanges[picture]
            kinds = [question_kind(*exchange) for exchange in exchanges]
            kept = _kept(kinds, self.yesno)
            yield {
                "id": f"easy-vqa-{self.split}-{picture:04d}",
                "conversations": _conversation([exchanges[i] for i in kept]),
                "images": pack_images([(self._folder / "images" / f"{picture}.png").read_bytes()]),
                "meta": {
                    "source": "easy-vqa",
                    "split": self.split,
                    "turns": "independent",
                    "kinds": [kinds[i] for i in kept],
                },
            }


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
    source = EasyVQASource(split, yesno=yesno)
    yield from source.records(0, len(source))


def write(
    out: str | Path,
    split: str,
    *,
    yesno: int | None = None,
    limit: int | None = None,
    workers: int = 0,
    size_limit: int = 1 << 26,
    progress: Callable[[int], None] | None = None,
    resumed: Callable[[int], None] | None = None,
) -> int:
    """Write one split as a dataset with the counts of its instruction sentences, or go on where a process was killed.

    Args:
        out: folder, new or empty, or a remote one; or what is left of the same call.
        split: ``"train"`` or ``"test"``.
        yesno: see :func:`read`.
        limit: number of records; default: all.
        workers, size_limit, progress, resumed: see :func:`opsin.data.write.write_dataset`.

    Returns:
        The number of records in the dataset.

    Raises:
        UserError: no such split, missing package, or ``out`` holds something already.
    """
    source = EasyVQASource(split, yesno=yesno, limit=limit)
    job = {"kind": "easy-vqa", "split": split, "yesno": yesno, "samples": len(source)}
    return write_dataset(
        out, source, job, size_limit=size_limit, workers=workers, progress=progress, resumed=resumed
    ).samples


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
