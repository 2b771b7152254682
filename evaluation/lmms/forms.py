"""Forms of local tasks: which columns each reads, how rows of other files become those, and the parquet file of them."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ...models.errors import UserError
from ..readers import Row
from .columns import right_choice

LETTERS = "ABCDEFGHIJ"
"""Columns of choices, in files that have one each."""

ROWS = 64
"""Rows with pictures that are in memory at once while a file is written."""

Columns = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """A kind of task.

    Attributes:
        columns: what its parquet file has beside the pictures.
        lists: those of them that are lists.
        pictures: ``image`` (one a question) or ``images`` (any number).
        of: a row of another file -> the columns.
        template: path of the YAML that its tasks include.
    """

    columns: tuple[str, ...]
    lists: tuple[str, ...]
    pictures: str
    of: Callable[[Row], Columns]
    template: Callable[[], Path]


def write_table(file: Path, form: Form, rows: Iterable[tuple[Columns, Sequence[bytes]]]) -> None:
    """Write rows with their encoded pictures as Hugging Face datasets does.

    Raises:
        UserError: no rows, or one whose number of pictures the form cannot show.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, Sequence, Value  # pyright: ignore[reportMissingImports]

    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise UserError("no question in it")
    features: dict[str, Any] = {
        name: Sequence(Value("string")) if name in form.lists else Value("string") for name in form.columns
    }
    features[form.pictures] = Image() if form.pictures == "image" else Sequence(Image())
    schema = Features(features).arrow_schema
    with pq.ParquetWriter(file, schema) as writer:
        rows = chain([first], rows)
        while part := list(islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist([_packed(form, *row) for row in part], schema=schema))


def _packed(form: Form, values: Columns, pictures: Sequence[bytes]) -> Columns:
    packed: Any = [{"bytes": one, "path": None} for one in pictures]
    if form.pictures == "image":
        if len(packed) != 1:
            raise UserError(f"'{values['question']}': {len(packed)} pictures; this form shows one")
        packed = packed[0]
    return {**{name: values[name] for name in form.columns}, form.pictures: packed}


def fits(file: Path, form: Form) -> bool:
    """Whether a parquet file has the form's columns, and pictures that Hugging Face datasets takes for such.

    Raises:
        UserError: it is no parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as parquet ({str(error).splitlines()[0]})") from error
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features", {})
    names = (form.pictures,) if form.pictures == "image" else ("image", "images")
    shown = json.dumps([features.get(name) for name in names if name in schema.names])
    return set(form.columns) <= set(schema.names) and '"Image"' in shown


def _pope(row: Row) -> Columns:
    answer = row.text("answer", "label").lower()
    if answer not in ("yes", "no"):
        raise UserError(f"{row.place}: answer '{answer}': use yes or no")
    return {
        "question_id": row.text("question_id", "id", "index"),
        "question": row.text("question", "text"),
        "category": row.optional("category", "type") or "all",
        "answer": answer,
    }


def _choices(row: Row) -> Columns:
    if "choices" in row or "options" in row:
        known = _list(row, "choices", "options")
    else:
        known = [row.optional(letter) for letter in LETTERS if row.optional(letter)]
    if len(known) < 2:
        raise UserError(f"{row.place}: {len(known)} choices; give a list in 'choices', or columns A, B ...")
    try:
        answer = known[right_choice({"choices": known, "answer": row.text("answer", "label")})]
    except ValueError as error:
        raise UserError(f"{row.place}: {error}") from error
    return {"question": row.text("question", "prompt", "text"), "choices": known, "answer": answer}


def _open(row: Row) -> Columns:
    answers = [one for one in _list(row, "answers", "answer", "label") if one]
    if not answers:
        raise UserError(f"{row.place}: no answer")
    return {"question": row.text("question", "text"), "answers": answers}


def _list(row: Row, *names: str) -> list[str]:
    """A list in a column, or written as text there (JSON, or as Python prints it); one value is a list of one."""
    value = row[row.column(*names)]
    if isinstance(value, str) and value.strip()[:1] == "[":
        value = _written(value, f"{row.place}: column '{names[0]}'")
    if not isinstance(value, list | tuple):
        value = [] if value is None else [value]
    return [str(one).strip() for one in value]


def _written(text: str, where: str) -> Any:
    def tried() -> Iterator[Any]:
        for read in (json.loads, ast.literal_eval):
            try:
                yield read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue

    found = next(tried(), None)
    if found is None:
        raise UserError(f"{where} starts as a list and is none")
    return found


def _shipped(name: str) -> Path:
    return Path(__file__).with_name("templates") / f"{name}.yaml"


def installed() -> Path:
    """Folder of the installed lmms-eval, which is not imported.

    Raises:
        UserError: there is none.
    """
    found = find_spec("lmms_eval")
    if found is None or not found.submodule_search_locations:
        raise UserError("lmms-eval is not installed here; install Opsin with the extra 'eval'")
    return Path(found.submodule_search_locations[0])


def _pope_of_lmms() -> Path:
    """lmms-eval's own task, whose prompt, reading and measures are used as they are."""
    return installed() / "tasks" / "pope" / "pope.yaml"


FORMS: dict[str, Form] = {
    "pope": Form(
        ("question_id", "question", "category", "answer"), (), "image", _pope, _pope_of_lmms
    ),
    "choices": Form(
        ("question", "choices", "answer"), ("choices",), "images", _choices, lambda: _shipped("choices")
    ),
    "open": Form(("question", "answers"), ("answers",), "images", _open, lambda: _shipped("open")),
}  # fmt: skip
"""lmms-eval's own POPE; choices, ranked by log-likelihood; short answers in words, matched."""
