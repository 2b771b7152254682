"""Tasks of lmms-eval for files that lie here: YAMLs written for one run, with absolute paths.

A parquet file with the columns and the pictures that a task reads is used as it lies; every other file that
``evaluation.readers`` can read becomes such a parquet file first. Files in object storage are fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ...models.errors import UserError, nearest
from ..readers import check_pictures, local_file, pictures_of, read_rows
from ..readers.addresses import folder_of
from ..records import Item
from .forms import FORMS, Form, fits, installed, write_table

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Names of tasks: lmms-eval separates them by commas and makes files of them."""

KEYWORDS = ("form", "path", "images", "prompt_suffix", "max_new_tokens")

CACHE = "cache"
"""What Hugging Face datasets makes of the parquet files that were written for a run; of no use behind it."""


def write_tasks(folder: Path, tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Write a YAML for each task, and a parquet file where its file cannot be used as it lies.

    Args:
        folder: to be given to lmms-eval as ``include_path``.
        tasks: name -> ``form`` (``pope``, ``choices`` or ``open``), ``path`` (file or URL), and where wanted ``images``
            (folder or URL of pictures that the file names), ``prompt_suffix`` (behind every question, instead of the
            form's own) and ``max_new_tokens``.

    Returns:
        the names.

    Raises:
        UserError: a task that cannot be made; the line names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, spec in tasks.items():
        if not NAME.fullmatch(str(name)):
            raise UserError(f"task '{name}': use letters, digits, '_', '-' and '.'")
        try:
            form = _checked(spec)
            data = _data(folder / f"{name}.parquet", form, spec)
            write_task(
                folder, name, spec["form"], data, spec.get("prompt_suffix"), spec.get("max_new_tokens")
            )
        except UserError as error:
            raise UserError(f"task {name}: {error}") from error
    return list(tasks)


def refuse_taken(names: Sequence[str]) -> None:
    """Refuse names that tasks of lmms-eval have: it would ask its own task, on other data, without a word.

    Raises:
        UserError: one is taken.
    """
    said = re.compile(r"""^(?:task|group|tag)\s*:\s*["']?([^"'#\s]+)""", re.MULTILINE)
    for text in _yamls(installed() / "tasks"):
        taken = set(said.findall(text)) & set(names)
        if taken:
            raise UserError(f"task {sorted(taken)[0]}: lmms-eval has a task of this name; choose another")


def refuse_unknown(names: Sequence[str], folder: Path | None) -> None:
    """Refuse names that no YAML of lmms-eval, nor of a folder, so much as mentions: it takes a minute to say so itself.

    Raises:
        UserError: one is nowhere; the line names the nearest task.
    """
    wanted = {name for name in names if "*" not in name}
    tasks: set[str] = set()
    for text in (t for place in (installed() / "tasks", folder) if place is not None for t in _yamls(place)):
        words = set(re.findall(r"[^\s\"'#,\[\]]+", text))
        wanted -= words
        tasks |= set(re.findall(r"""^(?:task|group)\s*:\s*["']?([^"'#\s]+)""", text, re.MULTILINE))
    if wanted:
        name = sorted(wanted)[0]
        close = get_close_matches(name, tasks, n=1, cutoff=0.5)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise UserError(f"lmms: task {name}: unknown to lmms-eval{hint}")


def _yamls(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*.yaml"):
        yield file.read_text(encoding="utf-8", errors="replace")


def write_task(
    folder: Path,
    name: str,
    form: str,
    data: Path,
    prompt_suffix: str | None = None,
    max_new_tokens: int | None = None,
) -> Path:
    """Write the YAML of one task whose data is a parquet file; see :func:`write_tasks`."""
    body: dict[str, Any] = {
        "include": str(FORMS[form].template()),
        "task": name,
        "dataset_path": "parquet",
        # These replace what an included task says of its data: an access token of a hub among them.
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
    }
    if data.resolve().parent == folder.resolve():
        body["dataset_kwargs"]["cache_dir"] = str(folder.resolve() / CACHE)
    if prompt_suffix is not None:
        body["lmms_eval_specific_kwargs"] = {"default": {"pre_prompt": "", "post_prompt": prompt_suffix}}
    if max_new_tokens is not None:
        body["generation_kwargs"] = {"max_new_tokens": max_new_tokens, "do_sample": False, "until": ["\n\n"]}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(body, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return file


def write_items(file: Path, items: Iterable[Item], form: str) -> Path:
    """Questions of one of our suites as the parquet file of a task: prompts as they are, marks and suffix included.

    The task then needs ``prompt_suffix: ""``, or its own suffix comes behind ours.
    """
    rows = (
        (
            {
                "question_id": item.id,
                "question": item.question,
                "category": item.kind,
                "answer": item.gold,
                "answers": [item.gold],
                "choices": list(item.choices),
            },
            [read() for read in item.pictures],
        )
        for item in items
    )
    write_table(file, FORMS[form], rows)
    return file


def _checked(spec: Mapping[str, Any]) -> Form:
    if not isinstance(spec, Mapping):
        raise UserError(f"{spec}: give form: and path:")
    for key in spec:
        if key not in KEYWORDS:
            raise UserError(f"'{key}': unknown{nearest(str(key), KEYWORDS)}")
    for key in KEYWORDS[:4]:
        if not isinstance(spec.get(key), str) and (spec.get(key) is not None or key in ("form", "path")):
            raise UserError(f"{key}: {spec.get(key, 'missing')}: use text")
    if spec["form"] not in FORMS:
        raise UserError(f"form '{spec['form']}': unknown{nearest(spec['form'], FORMS)}")
    most = spec.get("max_new_tokens")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise UserError(f"max_new_tokens: {most}: use a number, 1 or more")
    if most is not None and spec["form"] == "choices":
        raise UserError("max_new_tokens: choices are ranked, nothing is generated")
    return FORMS[spec["form"]]


def _data(made: Path, form: Form, spec: Mapping[str, Any]) -> Path:
    """The parquet file of a task: the given one, or one made of it."""
    address = spec["path"]
    if address.lower().endswith(".parquet"):
        there = local_file(address)
        if fits(there, form):
            return there
    images = spec.get("images") or folder_of(address)
    asked = []
    for row in read_rows(address, ("image", "images")):
        shown = row.get("images") or row.get("image") or []
        asked.append((form.of(row), pictures_of(shown, images, row.place)))
    check_pictures(picture for _, pictures in asked for picture in pictures)
    write_table(made, form, ((values, [read() for read in pictures]) for values, pictures in asked))
    return made
