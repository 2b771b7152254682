"""MMVP (arXiv 2401.06209) and CV-Bench (arXiv 2406.16860): vision-centric multiple choice."""

from __future__ import annotations

from ...models.errors import UserError
from ..readers import Row, question_files, read_rows
from ..readers.addresses import folder_of, joined
from ..readers.pictures import pictures_of
from ..records import Item, Picture
from ..scorers.cvbench import SOURCES
from ..suites import Suite
from .items import (
    LETTER_PROMPT,
    known,
    letter_of,
    lettered,
    letters,
    make_suite,
    one_picture,
    option_list,
    take_turns,
    turn,
)

LABELS = {
    "official": {99: "A", 100: "B", 279: "A", 280: "B"},
    "corrected": {99: "B", 100: "A", 279: "B", 280: "A"},
}
"""Answers of MMVP's questions (column ``Index``, from 1) in which two versions of its labels differ, as lmms-eval's task
documents them. Both pairs have their answers the wrong way round in ``Questions.csv``."""

_PARTS = {"2d": SOURCES[:2], "3d": SOURCES[2:]}


def mmvp(
    path: str | list[str],
    images: str | None = None,
    labels: str = "official",
    prompt: str = LETTER_PROMPT,
    mode: str = "generate",
    max_new_tokens: int = 16,
    limit: int | None = None,
    scorer: str = "mmvp",
    group: str = "2d",
) -> Suite:
    """MMVP, from ``Questions.csv`` and the folder ``MMVP Images`` beside it, or a parquet file with ``image``.

    Columns ``Index``, ``Question``, ``Options`` (``(a) Open (b) Closed``) and ``Correct Answer``. Questions 2k - 1 and 2k
    are a pair, ``meta.pair``.

    Args:
        path: the file, or the folder that has it; or a list of files.
        images: folder of ``1.jpg``, ``2.jpg`` ...; default: ``MMVP Images`` beside the file.
        labels: whose answers of the four questions in ``LABELS`` hold, whatever the file has there: ``official`` (those of
            the published numbers) or ``corrected`` (lmms-eval's). Scores of the two are not comparable.
        prompt, mode, max_new_tokens, limit, group: see :func:`.yes_no.pope`.
        scorer: ``mmvp``, or with ``@token``.

    Raises:
        UserError: a keyword is wrong; or, when it is loaded, a file is.
    """
    known("labels", labels, LABELS)

    def load() -> list[Item]:
        items = []
        for file in question_files(path, ["Questions.csv"]):
            folder = joined(folder_of(file), "MMVP Images") if images is None else images
            for row in read_rows(file):
                index = _index(row)
                options = _marked_options(row, row.text("Options"))
                gold = letter_of(row, row.text("Correct Answer"), len(options))
                meta = {"pair": (index - 1) // 2, "labels": labels, "options": list(options)}
                asked = turn(row, f"{row.text('Question')}\n{lettered(options)}", 1, prompt)
                items.append(
                    Item(
                        str(index), asked, _picture(row, index, folder), LABELS[labels].get(index, gold),
                        choices=letters(len(options)), meta=meta,
                    )
                )  # fmt: skip
        return items

    return make_suite(
        load, path, group=group, scorer=scorer, mode=mode, max_new_tokens=max_new_tokens, limit=limit
    )


def _index(row: Row) -> int:
    text = row.text("Index", "lndex")  # the file once had an l there
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{row.place}: column 'Index' is '{text}', not 1 or more")
    return int(text)


def _picture(row: Row, index: int, folder: str) -> tuple[Picture, ...]:
    if "image" in row:
        return one_picture(row, ("image",), folder)
    return pictures_of([f"{index}.jpg"], folder, row.place)


def _marked_options(row: Row, text: str) -> tuple[str, ...]:
    """``(a) Open (b) Closed`` -> ``Open``, ``Closed``."""
    options, rest = [], text
    for letter in letters(26):
        before, mark, behind = rest.partition(f"({letter.lower()})")
        if not mark:
            break
        options.append(before.strip())
        rest = behind
    options.append(rest.strip())
    if len(options) < 3 or options[0] or not all(options[1:]):
        raise UserError(f"{row.place}: options '{text}' are not of the form '(a) one (b) other'")
    return tuple(options[1:])


def cv_bench(
    path: str | list[str],
    images: str | None = None,
    part: str | None = None,
    prompt: str = LETTER_PROMPT,
    mode: str = "generate",
    max_new_tokens: int = 16,
    limit: int | None = None,
    scorer: str | None = None,
    group: str | None = None,
) -> Suite:
    """CV-Bench, from its parquet files (``test_2d.parquet``, ``test_3d.parquet``) or its JSON lines and pictures.

    Columns ``idx``, ``type`` (2D, 3D), ``task``, ``source``, ``prompt`` (the question with its options), ``choices``,
    ``answer`` (``(C)``), and ``image`` or ``filename``. Tasks, which are kinds, and sources take turns: with ``limit`` there
    are as many of each.

    Args:
        path: folder of the files (a remote one: of the parquet files), or one of them, or a list of files.
        images: folder that ``filename`` starts from; default: that of the file.
        part: ``2d`` or ``3d``; default: both. Tables by group have a place for each part, not for both together.
        prompt, mode, max_new_tokens, limit: see :func:`.yes_no.pope`.
        scorer: default: ``cv_bench`` (the official mean over sources), ``cv_bench_2d`` or ``cv_bench_3d``, by ``part``.
        group: default: ``general``, ``2d`` or ``3d``, by ``part``.

    Raises:
        UserError: a keyword is wrong; or, when it is loaded, a file is.
    """
    if part is not None:
        known("part", part, _PARTS)
    sets = [["test_2d.parquet", "test_3d.parquet"], ["test_2d.jsonl", "test_3d.jsonl"]]
    if part is not None:
        sets = [[name for name in names if part in name] for names in sets]
    sources = SOURCES if part is None else _PARTS[part]

    def load() -> list[Item]:
        items = []
        for file in question_files(path, *sets):
            for row in read_rows(file, ("image", "filename")):
                source = row.text("source")
                known(f"{row.place}: source", source, SOURCES)
                if source not in sources:
                    continue
                options = option_list(row, "choices")
                task, kind = row.text("task"), row.text("type")
                meta = {"source": source, "type": kind, "options": list(options)}
                pictures = one_picture(
                    row, ("image", "filename"), folder_of(file) if images is None else images
                )
                asked = turn(row, row.text("prompt"), 1, prompt)
                gold = letter_of(row, row.text("answer"), len(options))
                name = f"{kind}/{row.text('idx')}"
                items.append(Item(name, asked, pictures, gold, task, letters(len(options)), meta))
        return take_turns(items, lambda item: (item.kind, item.meta["source"]))

    return make_suite(
        load, path, group=group or part or "general", scorer=scorer or f"cv_bench{(part and f'_{part}') or ''}",
        mode=mode, max_new_tokens=max_new_tokens, limit=limit,
    )  # fmt: skip
