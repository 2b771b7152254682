"""MMBench (arXiv 2307.06281) and what else comes as VLMEvalKit's TSV with rolled copies of each question."""

from __future__ import annotations

from ...models.errors import UserError
from ..readers import Row, question_files, read_rows
from ..readers.addresses import folder_of
from ..readers.pictures import pictures_of
from ..records import Item
from ..scorers.mcq import ROLL
from ..suites import Suite
from .items import (
    LETTER_PROMPT,
    NOTHING,
    letter_of,
    lettered,
    letters,
    make_suite,
    option_columns,
    turn,
)


def mmbench(
    path: str | list[str],
    images: str | None = None,
    splits: list[str] | None = None,
    prompt: str = LETTER_PROMPT,
    mode: str = "generate",
    max_new_tokens: int = 16,
    limit: int | None = None,
    scorer: str = "mmbench",
    group: str = "general",
) -> Suite:
    """MMBench, from VLMEvalKit's TSV (``MMBench_DEV_EN.tsv``) or the same columns as parquet or JSON.

    Columns ``index``, ``question``, ``hint``, ``A`` ... , ``answer``, ``category``, ``l2-category``, ``split``, and ``image``
    (base64, or the index of the row that has the same picture) or ``image_path``. Rows whose indices are the same modulo
    a million are copies of a question with rolled options, and follow each other here: with ``limit``, only the last
    question may lack copies. Kinds are categories.

    Args:
        path: the file, or a list of files.
        images: folder that ``image_path`` starts from; default: that of the file.
        splits: values of ``split`` (``dev``) that are asked; default: all.
        prompt, mode, max_new_tokens, limit, group: see :func:`.yes_no.pope`.
        scorer: ``mmbench`` (circular), or with ``@token``.

    Raises:
        UserError: a keyword is wrong; or, when it is loaded, the file is; also one without answers (``test``).
    """

    def load() -> list[Item]:
        items: list[Item] = []
        for file in question_files(path):
            folder = folder_of(file) if images is None else images
            rows: dict[int, Row] = {}
            for row in read_rows(file, ("image", "image_path")):
                other = rows.setdefault(_index(row), row)
                if other is not row:
                    raise UserError(f"{row.place}: index {row['index']} is that of {other.place}, too")
            here = {row.text("split") for row in rows.values()} if splits else set()
            for split in splits or ():
                if split not in here:
                    raise UserError(f"splits: '{split}': {file} has {', '.join(sorted(here))}")
            chosen = {index: row for index, row in rows.items() if not splits or row.text("split") in splits}
            first: dict[int, int] = {}
            for index in chosen:
                first.setdefault(index % ROLL, len(first))
            order = sorted(chosen, key=lambda index: (first[index % ROLL], index))
            items += [_item(index, rows, folder, prompt) for index in order]
        return items

    return make_suite(
        load, path, group=group, scorer=scorer, mode=mode, max_new_tokens=max_new_tokens, limit=limit
    )


def _item(index: int, rows: dict[int, Row], folder: str, prompt: str) -> Item:
    row = rows[index]
    if not row.optional("answer"):
        raise UserError(f"{row.place}: no answer; files of a test split have none, use the dev file")
    options = option_columns(row)
    holder = _holder(row, rows)
    column = next((c for c in ("image", "image_path") if holder.get(c)), None)
    pictures = pictures_of(holder[column] if column else [], folder, row.place)
    hint = row.optional("hint")
    text = "\n".join([*([hint] if hint not in NOTHING else []), row.text("question"), lettered(options)])
    meta = {
        "index": index,
        "options": list(options),
        "l2_category": row.optional("l2-category", "L2-category", "l2_category"),
        "split": row.optional("split"),
    }
    return Item(
        str(index), turn(row, text, len(pictures), prompt), pictures, letter_of(row, row.text("answer"), len(options)),
        row.optional("category") or "all", letters(len(options)), meta,
    )  # fmt: skip


def _holder(row: Row, rows: dict[int, Row]) -> Row:
    """The row that has this row's pictures: itself, or the one whose index stands in their place."""
    stored = row.get("image") or []
    if len(stored) == 1 and isinstance(stored[0], str) and stored[0].isdecimal():
        other = rows.get(int(stored[0]))
        if other is None:
            raise UserError(
                f"{row.place}: its picture should be that of index {stored[0]}, which is not there"
            )
        return other
    return row


def _index(row: Row) -> int:
    text = row.text("index")
    if not text.isdecimal():
        raise UserError(f"{row.place}: column 'index' is '{text}', not a whole number")
    return int(text)
