"""POPE (arXiv 2305.10355) and HallusionBench (arXiv 2310.14566): questions that are answered yes or no."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...models.errors import UserError
from ..readers import Row, question_files, read_rows
from ..readers.addresses import folder_of, joined
from ..records import Item
from ..scorers import make
from ..scorers.pope import SPLITS
from ..suites import Suite
from .items import WORD_PROMPT, known, make_suite, one_picture, take_turns, turn

LABELS = ("Yes", "No")
"""What yes and no are called where they are ranked."""

_SPLIT = re.compile("|".join(SPLITS))
_GOLD = {"1": "yes", "0": "no", "yes": "yes", "no": "no"}


def pope(
    path: str | list[str],
    images: str | None = None,
    splits: list[str] | None = None,
    files: str = "coco_pope_{split}.json",
    labels: tuple[str, str] = LABELS,
    prompt: str = WORD_PROMPT,
    mode: str = "generate",
    max_new_tokens: int = 8,
    limit: int | None = None,
    scorer: str = "pope",
    group: str = "hallucination",
) -> Suite:
    """POPE, from its own files (JSON lines: ``question_id``, ``image``, ``text``, ``label``) or the parquet file of its copy on
    the Hugging Face hub (``question_id``, ``question``, ``answer``, ``category``, ``image``).

    A file that names a split has that split's questions; else ``category`` says whose they are. Splits, which are
    kinds, take turns: with ``limit`` there are as many of each.

    Args:
        path: folder of the files, or one of them, or a list of files; here as in all suites, local or ``s3://`` and the like.
        images: folder of the pictures (COCO's ``val2014``); default: that of the file.
        splits: of ``random``, ``popular``, ``adversarial``; default: all.
        files: names of the files in the folder; ``{split}`` is the split.
        labels: what yes and no are called where they are ranked.
        prompt: sentence behind every question, on a line of its own; empty: none.
        mode: ``generate`` or ``rank``.
        max_new_tokens: longest answer.
        limit: the first so many questions.
        scorer: ``pope``, ``pope_read``, or either with ``@token``.
        group: of tables.

    Raises:
        UserError: a keyword is wrong; or, when it is loaded, a file is.
    """
    for split in splits or ():
        known("splits", split, SPLITS)
    if "{split}" not in files:
        raise UserError(f"files: '{files}': needs {{split}} in it, as in coco_pope_{{split}}.json")
    wanted, choices = tuple(splits or SPLITS), _choices(labels, scorer)

    def load() -> list[Item]:
        names = [files.replace("{split}", split) for split in wanted]
        items = []
        for file in question_files(path, names):
            named = _SPLIT.findall(file.rpartition("/")[2])
            for row in read_rows(file):
                split = row.optional("category").lower() or (named or [""])[-1] or row.text("category")
                known(f"{row.place}: category", split, SPLITS)
                if split in wanted:
                    pictures = one_picture(row, ("image",), folder_of(file) if images is None else images)
                    asked = turn(row, row.text("text", "question"), 1, prompt)
                    gold = _gold(row, "label", "answer")
                    number = row.text("question_id")
                    items.append(
                        Item(f"{split}/{number}", asked, pictures, gold, split, choices, {"split": split})
                    )
        lacking = [split for split in splits or () if all(item.kind != split for item in items)]
        if lacking:
            raise UserError(
                f"{path}: no question of split '{lacking[0]}'; name those that are there under splits"
            )
        return take_turns(items, lambda item: item.kind)

    return make_suite(
        load, path, group=group, scorer=scorer, mode=mode, max_new_tokens=max_new_tokens, limit=limit
    )


def hallusion_bench(
    path: str | list[str],
    images: str | None = None,
    without_picture: bool = True,
    labels: tuple[str, str] = LABELS,
    prompt: str = "",
    mode: str = "generate",
    max_new_tokens: int = 128,
    limit: int | None = None,
    scorer: str = "hallusion_bench",
    group: str = "hallucination",
) -> Suite:
    """HallusionBench, from ``HallusionBench.json`` or the parquet files of its copy on the Hugging Face hub (``category``,
    ``subcategory``, ``set_id``, ``figure_id``, ``question_id``, ``question``, ``gt_answer``, ``visual_input``, ``filename``,
    ``image``).

    Questions whose ``visual_input`` is 0 (figure 0 of category VS) are asked without a picture. Kinds are
    ``category/subcategory``.

    Args:
        path: the file, or the folder that has it; or a list of files.
        images: folder with ``VD`` and ``VS`` in it; default: ``hallusion_bench`` beside the file.
        without_picture: also ask the questions that have none. lmms-eval does not.
        labels, prompt, mode, max_new_tokens, limit, group: see :func:`pope`.
        scorer: ``hallusion_bench``, or with ``@token``.

    Raises:
        UserError: a keyword is wrong; or, when it is loaded, a file is.
    """

    choices = _choices(labels, scorer)

    def load() -> list[Item]:
        items = []
        for file in question_files(path, ["HallusionBench.json"]):
            folder = joined(folder_of(file), "hallusion_bench") if images is None else images
            for row in read_rows(file, ("image", "filename")):
                seen = row.text("visual_input") != "0"
                if not seen and not without_picture:
                    continue
                row["filename"] = [_in_folder(name) for name in row.get("filename", [])]
                pictures = one_picture(row, ("image", "filename"), folder) if seen else ()
                meta = {
                    key: row.text(key)
                    for key in ("category", "subcategory", "set_id", "figure_id", "question_id")
                }
                asked = turn(row, row.text("question"), len(pictures), prompt)
                kind = f"{meta['category']}/{meta['subcategory']}"
                gold = _gold(row, "gt_answer")
                items.append(Item("/".join(meta.values()), asked, pictures, gold, kind, choices, meta))
        return items

    return make_suite(
        load, path, group=group, scorer=scorer, mode=mode, max_new_tokens=max_new_tokens, limit=limit
    )


def _choices(labels: Sequence[str], scorer: str) -> tuple[str, str]:
    """Labels that the scorer reads as yes and no."""
    yes, no = labels
    for label, meant in ((yes, "yes"), (no, "no")):
        found = make(scorer).parse({"output": label})
        if found != meant:
            raise UserError(f"labels: '{label}': scorer {scorer} should read {meant}, and reads {found}")
    return yes, no


def _in_folder(name: object) -> object:
    """``./hallusion_bench/VD/...`` and ``./VD/...``, as versions of the file have them, both as ``VD/...``."""
    return name.removeprefix("./").removeprefix("hallusion_bench/") if isinstance(name, str) else name


def _gold(row: Row, *columns: str) -> str:
    answer = row.text(*columns)
    gold = _GOLD.get(answer.lower())
    if gold is None:
        raise UserError(f"{row.place}: column '{row.column(*columns)}' is '{answer}', not yes or no")
    return gold
