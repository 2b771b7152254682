"""Which questions are about one picture, and the pictures themselves where the study kept them.

Questions about one picture are not independent, so pictures are resampled, never questions. Whatever hangs together by a
measure (the two pictures of a minimal pair, the rolled copies of a question, the figures of a set) is one unit, too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...models.errors import UserError
from ..scorers.mcq import ROLL
from ..suites import Suite
from .measures import SAME_GROUP

FOLDER, INDEX = "pictures", "index.json"
NAMED = ("picture", "image", "image_id", "figure")
"""Keys of ``meta`` that name a picture, where the study kept none."""

_TURN = re.compile(r"/\d+$")
_SCENE = re.compile(r"^scenes/[^/]+/(\d+/\d+)$")


def keep_pictures(folder: Path, suite: str, pictures: Iterable[tuple[str, Sequence[bytes]]]) -> None:
    """Keep the pictures of a suite's questions beside the study, each distinct one once.

    They show the wall of disagreements, and tell which questions share a picture. Calling it again adds to what is there.

    Args:
        folder: of the study.
        suite: name of the suite.
        pictures: (id of a question, its encoded pictures).
    """
    where = Path(folder) / FOLDER
    where.mkdir(parents=True, exist_ok=True)
    index = read_index(folder)
    names = index.setdefault(suite, {})
    for question, encoded in pictures:
        names[question] = []
        for data in encoded:
            digest = hashlib.sha256(data).hexdigest()[:32]
            names[question].append(digest)
            path = where / digest
            if not path.is_file():
                partial = path.with_suffix(".partial")
                partial.write_bytes(data)
                partial.replace(path)
    partial = where / f"{INDEX}.partial"
    partial.write_text(json.dumps(index, sort_keys=True), encoding="utf-8")
    partial.replace(where / INDEX)


def keep_suites(folder: Path, suites: Mapping[str, Suite], limit: int | None = None) -> None:
    """Keep the pictures of all questions of some suites, as an evaluation asks them.

    Args:
        folder: of the study.
        suites: by the names that predictions have.
        limit: the first so many questions of each; None: all.
    """
    for name, suite in suites.items():
        items = list(suite.load())[:limit]
        keep_pictures(folder, name, ((item.id, [read() for read in item.pictures]) for item in items))


def read_index(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Suite -> id of a question -> digests of its pictures; empty: the study kept none.

    Raises:
        UserError: the index is none.
    """
    path = Path(folder) / FOLDER / INDEX
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        plain = {s: {q: [str(d) for d in ds] for q, ds in ids.items()} for s, ids in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: no index of pictures") from error
    strange = next((d for ids in plain.values() for ds in ids.values() for d in ds if not d.isalnum()), None)
    if strange is not None:
        raise UserError(f"{path}: no name of a picture: {strange!r}")
    return plain


def kept_pictures(
    folder: Path, index: Mapping[str, Mapping[str, Sequence[str]]], suite: str, question: str
) -> list[bytes]:
    """Encoded pictures of a question.

    Raises:
        UserError: the study kept none of it.
    """
    digests = index.get(suite, {}).get(question)
    if digests is None:
        raise UserError("the study kept none")
    return [(Path(folder) / FOLDER / digest).read_bytes() for digest in digests]


class Units:
    """Numbers of pictures (and of what hangs together with them) for the questions of one suite.

    Args:
        records: all questions that some run was asked, as predictions.
        scorer: name of their scorer.
        digests: id -> digests of its pictures, where the study kept them.

    Attributes:
        names: of the units, sorted; each is that of its smallest key.
        by_picture: whether all questions could be told by their pictures; else some stand for themselves.
    """

    def __init__(
        self, records: Iterable[Mapping[str, Any]], scorer: str, digests: Mapping[str, Sequence[str]]
    ):
        parent: dict[Hashable, Hashable] = {}

        def root(key: Hashable) -> Hashable:
            parent.setdefault(key, key)
            while parent[key] != key:
                parent[key] = parent[parent[key]]
                key = parent[key]
            return key

        first: dict[str, Hashable] = {}
        self.by_picture = True
        for record in records:
            keys, known = _keys(record, scorer.partition("@")[0], digests.get(record["id"]))
            self.by_picture &= known
            roots = sorted({root(key) for key in keys}, key=repr)
            for other in roots[1:]:
                parent[other] = roots[0]
            first[record["id"]] = keys[0]
        smallest: dict[Hashable, str] = {}
        for key in first.values():
            top = root(key)
            smallest[top] = min(smallest.get(top, repr(key)), repr(key))
        self.names = sorted(smallest.values())
        places = {name: i for i, name in enumerate(self.names)}
        self._of = {question: places[smallest[root(key)]] for question, key in first.items()}

    def __len__(self) -> int:
        return len(self.names)

    def of(self, question: str) -> int:
        """Number of a question's unit."""
        return self._of[question]


def _keys(
    record: Mapping[str, Any], scorer: str, digests: Sequence[str] | None
) -> tuple[list[Hashable], bool]:
    """What a question hangs together by, and whether its picture is among that."""
    meta, keys = record["meta"], []
    keys += [("picture", digest) for digest in digests or ()]
    if digests is None:
        keys += [("picture", str(meta[key])) for key in NAMED if isinstance(meta.get(key), str | int)]
        sample = _TURN.sub("", record["id"])
        scene = _SCENE.match(sample)
        if scene:  # the splits of scenes are twins: the same picture but for what is asked
            keys.append(("scene", scene[1]))
        elif (
            sample != record["id"] and isinstance(meta.get("source"), str) and meta.get("objects") is not None
        ):
            keys.append(("sample", sample))
    known = bool(keys) or digests is not None
    if meta.get("pair") is not None:
        keys.append(("pair", str(meta["pair"])))
    if scorer == "mmbench" and meta.get("index") is not None:
        keys.append(("index", int(meta["index"]) % ROLL))
    if scorer in SAME_GROUP:
        keys.append(("group", *(str(meta.get(key)) for key in SAME_GROUP[scorer])))
    return keys or [("question", record["id"])], known or bool(keys and meta.get("pair") is None)
