"""Any other file of questions: the columns are named by keywords."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...models.errors import UserError
from ..readers import Row, question_files, read_rows
from ..readers.addresses import folder_of
from ..records import Item, Picture
from ..scorers.letters import Letter
from ..suites import Suite
from .items import (
    LETTER_PROMPT,
    WORD_PROMPT,
    lettered,
    letters,
    make_suite,
    option_columns,
    option_list,
    row_pictures,
    turn,
)

_IDS = ("id", "index", "idx", "question_id")


def multiple_choice(
    path: str | list[str],
    images: str | None = None,
    question: str = "question",
    answer: str = "answer",
    choices: str | None = None,
    options_in_question: int | None = None,
    image: str | list[str] = "image",
    category: str | None = None,
    id: str | None = None,
    prompt: str = LETTER_PROMPT,
    mode: str = "generate",
    max_new_tokens: int = 16,
    limit: int | None = None,
    scorer: str = "letter",
    group: str = "general",
) -> Suite:
    """Multiple choice from any TSV, CSV, JSON or parquet file (MMStar, BLINK, AI2D ...).

    Args:
        path: the file, or a folder of parquet files; or a list of either.
        images: folder of pictures that rows name; default: that of the file.
        question: column of the question.
        answer: column of the answer: a letter, in any decoration, or an option's text.
        choices: column with the list of options; default: columns ``A``, ``B`` ...
        options_in_question: the question's text has its options, so many, already: none are added.
        image: column or columns of pictures; default: ``image``, else ``image_path``. Without any, questions are asked alone.
        category: column of the kind; default: ``category`` where it is there.
        id: column of the id; default: ``id``, ``index``, ``idx`` or ``question_id``, else the number of the row.
        prompt, mode, max_new_tokens, limit: see :func:`.yes_no.pope`.
        scorer: ``letter``, or with ``@token``.
        group: of tables.

    Raises:
        UserError: a keyword is wrong; or, when it is loaded, the file is.
    """
    if choices is not None and options_in_question is not None:
        raise UserError("choices: leave it out, or options_in_question")
    if options_in_question is not None and not 2 <= options_in_question <= 26:
        raise UserError(f"options_in_question: {options_in_question}: use 2 to 26")

    def item(row: Row, name: str, kind: str, pictures: tuple[Picture, ...]) -> Item:
        text, meta = row.text(question), {}
        count = options_in_question or 0
        if not count:
            options = option_list(row, choices) if choices else option_columns(row)
            count, meta = len(options), {"options": list(options)}
            text = f"{text}\n{lettered(options)}"
        asked = turn(row, text, len(pictures), prompt)
        record = {
            "gold": row.text(answer),
            "choices": letters(count),
            "meta": meta,
            "suite": row.place,
            "id": name,
        }
        return Item(name, asked, pictures, Letter().gold(record), kind, letters(count), meta)

    return make_suite(
        lambda: _items(path, images, image, category, id, item), path, group=group, scorer=scorer, mode=mode,
        max_new_tokens=max_new_tokens, limit=limit,
    )  # fmt: skip


def open_answers(
    path: str | list[str],
    images: str | None = None,
    question: str = "question",
    answer: str = "answer",
    choices: str | None = None,
    image: str | list[str] = "image",
    category: str | None = None,
    id: str | None = None,
    prompt: str = WORD_PROMPT,
    mode: str = "generate",
    max_new_tokens: int = 16,
    limit: int | None = None,
    scorer: str = "exact_relaxed",
    group: str = "general",
) -> Suite:
    """Short answers in words from any TSV, CSV, JSON or parquet file (RealWorldQA ...).

    Args:
        path, images, question, image, category, id: see :func:`multiple_choice`.
        answer: column of the answer.
        choices: column with a list of answers, for ``mode: rank``; they are not shown.
        prompt, mode, max_new_tokens, limit: see :func:`.yes_no.pope`.
        scorer: ``exact_relaxed``, ``exact``, ``first_words`` ...
        group: of tables.

    Raises:
        UserError: a keyword is wrong; or, when it is loaded, the file is.
    """

    def item(row: Row, name: str, kind: str, pictures: tuple[Picture, ...]) -> Item:
        among = option_list(row, choices) if choices else ()
        asked = turn(row, row.text(question), len(pictures), prompt)
        return Item(name, asked, pictures, row.text(answer), kind, among)

    return make_suite(
        lambda: _items(path, images, image, category, id, item), path, group=group, scorer=scorer, mode=mode,
        max_new_tokens=max_new_tokens, limit=limit,
    )  # fmt: skip


def _items(
    path: str | list[str],
    images: str | None,
    image: str | Sequence[str],
    category: str | None,
    name: str | None,
    item: Callable[[Row, str, str, tuple[Picture, ...]], Item],
) -> list[Item]:
    given = image != "image"
    columns = ["image", "image_path"] if not given else [image] if isinstance(image, str) else list(image)
    items: list[Item] = []
    for file in question_files(path):
        folder = folder_of(file) if images is None else images
        for row in read_rows(file, columns):
            if given:
                pictures = [picture for column in columns for picture in row_pictures(row, (column,), folder)]
            else:
                pictures = row_pictures(row, columns, folder) if any(c in row for c in columns) else ()
            kind = row.text(category) if category else row.optional("category")
            found = name or next((column for column in _IDS if row.optional(column)), None)
            number = row.text(found) if found else str(len(items) + 1)
            items.append(item(row, number, kind or "all", tuple(pictures)))
    return items
