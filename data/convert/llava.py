"""LLaVA's JSON and a folder of pictures, as a dataset; pictures keep their original bytes.

The file is a list of samples, or has one a line: ``{"id", "image"?: name or list of names, "conversations": [{"from",
"value"}]}``. Names are those of files in the picture folder; ``..`` and absolute paths are refused (links that lie in
the folder are followed: who made the folder made them). What is not clear from the file is decided thus:

* no ``id``: the sample's position, from 0. An ``id`` that came before: ``#`` and the position are added to it (public
  mixtures repeat the names of COCO's pictures).
* pictures, but no ``<image>`` in any turn: the marks stand in front of the first question, where LLaVA's own code puts
  them. Any other number of marks than pictures makes a bad sample.

A sample that training would refuse is a bad one: its turns do not alternate, a picture is missing or does not decode.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ...models.errors import UserError
from ..chat import BadConversation, exchanges
from ..schema import IMAGE_MARK, pack_images
from ..source import BadSample, Text
from ..write import Written, write_dataset
from .ids import unique
from .json_items import json_items
from .pictures import Unusable, picture_file


class LlavaSource:
    """Samples of one file. The file is read once; workers get the places of its samples and read those.

    Args:
        file: JSON list, or JSON lines.
        images: folder of the pictures.
        limit: take the first so many samples; default: all.

    Attributes:
        digest: SHA-1 of the file.
        renamed: position -> id, where it is not the one in the file.
        unmarked: number of samples with pictures and without a mark.
        bad: the first sample that is bad by its text alone; None if there is none.

    Raises:
        UserError: the file or folder cannot be read, or the file is no list of samples.
    """

    at_once = 16

    def __init__(self, file: str | Path, images: str | Path, *, limit: int | None = None):
        self.file, self.images = Path(file).expanduser(), Path(images).expanduser()
        if limit is not None and limit < 1:
            raise UserError(f"limit: at least 1, got {limit}")
        if not self.images.is_dir():
            raise UserError(f"{images}: no folder of pictures")
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        self.digest = hashlib.sha1(content).hexdigest()
        self._starts, self._ends = array("Q"), array("Q")  # in bytes; small to pickle
        self.unmarked = 0
        self.bad: BadSample | None = None
        names: list[str] = []
        for start, end, sample in json_items(content, str(file)):
            position = len(names)
            if position == limit:
                break
            self._starts.append(start)
            self._ends.append(end)
            names.append(_id(sample))
            fault = _fault(sample, position, names[-1])
            self.bad = self.bad or fault
            if fault is None and _names(sample) and not _marks(sample):
                self.unmarked += 1
        self.renamed = unique(names)

    @property
    def job(self) -> dict[str, Any]:
        """What decides the samples."""
        return {
            "kind": "llava",
            "json": self.digest,
            "images": str(self.images.resolve()),
            "samples": len(self),
        }

    def __len__(self) -> int:
        return len(self._starts)

    def records(self, first: int, end: int) -> Iterator[dict[str, Any] | BadSample]:
        """Samples ``first`` .. ``end`` - 1."""
        for position, sample in self._read(first, end):
            text = self._text(sample, position)
            yield text if isinstance(text, BadSample) else self._record(text, _id(sample))

    def texts(self) -> Iterator[Text | BadSample]:
        """All samples without their pictures, which nobody looks at."""
        for position, sample in self._read(0, len(self)):
            yield self._text(sample, position)

    def _read(self, first: int, end: int) -> Iterator[tuple[int, Any]]:
        with self.file.open("rb") as file:
            for position in range(first, end):
                start, stop = self._starts[position], self._ends[position]
                file.seek(start)
                yield position, json.loads(file.read(stop - start))

    def _text(self, sample: Any, position: int) -> Text | BadSample:
        name = _id(sample)
        fault = _fault(sample, position, name)
        if fault is not None:
            return fault
        turns, names = sample["conversations"], _names(sample)
        if names and not _marks(sample):
            at = next(i for i, turn in enumerate(turns) if turn["from"] == "human")
            marked = f"{IMAGE_MARK}\n" * len(names) + turns[at]["value"]
            turns = [*turns[:at], {**turns[at], "value": marked}, *turns[at + 1 :]]
        meta = {"source": "llava", "pictures": names}
        return Text(position, self.renamed.get(position, name), turns, meta, len(names))

    def _record(self, text: Text, name: str) -> dict[str, Any] | BadSample:
        pictures = []
        for picture in text.meta["pictures"]:
            try:
                pictures.append(picture_file(self.images / picture))
            except Unusable as error:
                return BadSample(name, text.position, picture, *error.args)
        return {
            "id": text.id,
            "conversations": text.conversations,
            "images": pack_images(pictures),
            "meta": text.meta,
        }


def write(
    out: str | Path,
    source: LlavaSource,
    *,
    skip_bad: bool = False,
    workers: int = 0,
    size_limit: int = 1 << 26,
    progress: Callable[[int], None] | None = None,
    resumed: Callable[[int], None] | None = None,
) -> Written:
    """Write a LLaVA file and its pictures as a dataset, or go on where an earlier process was killed.

    Args:
        out: new or empty folder, or a remote one; or what is left of the same call.
        source: the samples.
        skip_bad: leave bad samples out, and name them in ``skipped.jsonl`` beside the index.
        workers, size_limit, progress, resumed: see :func:`opsin.data.write.write_dataset`.

    Raises:
        UserError: a sample is bad (then there is no index), or ``out`` holds something else.
    """
    if source.bad is not None and not skip_bad:  # known before anything is written
        raise UserError(f"{source.bad}; mend it, or leave bad samples out with --skip-bad")
    if not len(source):
        raise UserError(f"{out}: no sample to write: the list is empty")
    return write_dataset(
        out, source, source.job, size_limit=size_limit, workers=workers, skip_bad=skip_bad, progress=progress,
        resumed=resumed,
    )  # fmt: skip


def _id(sample: Any) -> str:
    """The id in the file; empty if there is none."""
    name = sample.get("id") if isinstance(sample, dict) else None
    return "" if name is None or isinstance(name, bool | list | dict) else str(name)


def _names(sample: dict[str, Any]) -> list[str]:
    """Names of a checked sample's pictures."""
    names = sample.get("image")
    if names is None or names == "":
        return []
    return [names] if isinstance(names, str) else names


def _marks(sample: dict[str, Any]) -> int:
    return sum(turn["value"].count(IMAGE_MARK) for turn in sample["conversations"])


def _fault(sample: Any, position: int, name: str) -> BadSample | None:
    """What is wrong with a sample, without a look at its pictures."""

    def bad(reason: str, detail: str, file: str = "") -> BadSample:
        return BadSample(name, position, file, reason, detail)

    if not isinstance(sample, dict):
        return bad("conversation", f"no JSON object but a {type(sample).__name__}")
    if sample.get("id") is not None and isinstance(sample["id"], bool | list | dict):
        return bad("id", f"id is a {type(sample['id']).__name__}, no text or number")
    try:
        _, pairs = exchanges(sample.get("conversations") or ())
        text = json.dumps([sample["conversations"], name, sample.get("image")], ensure_ascii=False)
        text.encode()
    except BadConversation as error:
        return bad("conversation", str(error))
    except UnicodeEncodeError:
        return bad("text", "its text is no Unicode (half of a surrogate pair)")
    names = sample.get("image")
    if not isinstance(names, str | list | None) or not all(isinstance(n, str) and n for n in names or ()):
        return bad("image", "'image' is neither a name nor a list of names")
    names = _names(sample)
    for file in names:
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or "\0" in file or "\\" in file:
            return bad("path", "leads out of the picture folder, or is no relative path with '/'", file)
    asked = sum(question.count(IMAGE_MARK) for question, _ in pairs)
    if asked != _marks(sample):
        return bad("marks", f"{IMAGE_MARK} stands in an answer or a system prompt")
    if asked != len(names) and (asked or not names):
        return bad("marks", f"{asked} {IMAGE_MARK} marks in the questions, {len(names)} pictures")
    return None
