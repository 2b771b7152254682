"""An instruction set as what ViFT trains on: a dataset of captions and one of text-only instructions, with counts.

A first pass reads every conversation and decides (``data/convert/vift_rule.py``); no picture is decoded. Then both datasets are
written by the one writer (``data/write.py``), so each of them goes on where it was. A note beside each index says of which
job it is: a process that comes later leaves a dataset that is whole alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...models.errors import UserError
from ..messages import first_line, shown
from ..remote import fetch, join_address
from ..schema import stable_hash
from ..source import BadSample
from ..source import Text as SampleText
from ..stored import StoredSamples
from ..unfinished import WORK, work_folder
from ..write import Written, write_dataset
from .llava import LlavaSource
from .vift_report import Survey, dumps, make_report, nothing_generic
from .vift_rule import CAPTIONS, TEXT, Rule, choose, sentences, unusable
from .vift_source import Samples, SplitSource

REPORT = "split.json"
"""File beside both datasets: what was read, what became of it."""

NOTE = "split-vift.json"
"""File beside each index: of which job the dataset is."""

Progress = Callable[[str, int, int], None]


def survey(samples: Samples, rule: Rule, progress: Callable[[int], None] | None = None) -> Survey:
    """Decide which samples go where, in one linear read."""
    found = Survey()
    for done, text in enumerate(samples.texts(), 1):
        if isinstance(text, BadSample):
            found.dropped[unusable(text.reason)] += 1
            found.bad = found.bad or str(text)
        else:
            _add(found, text, rule)
        if progress:
            progress(done)
    return found


def _add(found: Survey, text: SampleText, rule: Rule) -> None:
    choice = choose(text, rule)
    found.with_pictures += bool(text.pictures)
    if choice.side:
        part = found.parts[choice.side]
        part.numbers.append(text.position)
        part.words.append(choice.words)
        part.exchanges.append(choice.exchanges)
        if choice.side == CAPTIONS and rule.caption_prompt == "keep":
            found.kept.update(sentences(choice.question))
        return
    found.dropped[choice.reason] += 1
    found.dropped_exchanges += choice.exchanges
    if choice.reason.startswith("unusable"):
        found.bad = found.bad or f"sample {text.position} (id {text.id!r}): {choice.reason}"
    if text.pictures:
        found.sentences.update(key for key in set(choice.first) if not rule.generic(key))


def open_samples(source: str, images: str | None, out: str) -> Samples:
    """What is to be split.

    Args:
        source: dataset (folder or URL), or a LLaVA file (``.json``, ``.jsonl``).
        images: folder of a LLaVA file's pictures.
        out: where the datasets are to be.

    Raises:
        UserError: it is neither, cannot be read, or lies where the datasets are to be.
    """
    remote = "://" in source
    if remote == ("://" in out):
        place: Any = source.rstrip("/") if remote else Path(source).expanduser().resolve()
        target: Any = out.rstrip("/") if remote else Path(out).expanduser().resolve()
        inside = place.startswith(f"{target}/") if remote else target in place.parents
        if place == target or inside:
            raise UserError(
                f"{shown(out)}: the source {shown(source)} lies there; choose another folder for the split"
            )
    if not remote and Path(source).suffix in (".json", ".jsonl") and not Path(source).expanduser().is_dir():
        if images is None:
            raise UserError(f"{source}: a LLaVA file needs the folder of its pictures: --images FOLDER")
        return LlavaSource(source, images)
    if images is not None:
        raise UserError(f"--images {images}: only for a LLaVA file (.json, .jsonl); {shown(source)} is none")
    return StoredSamples(source)


def split(
    samples: Samples,
    out: str,
    rule: Rule,
    *,
    skip_bad: bool = False,
    workers: int = 0,
    size_limit: int = 1 << 26,
    progress: Progress | None = None,
    resumed: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Write ``out/captions``, ``out/text`` and ``out/split.json``, or go on where an earlier process was killed.

    Args:
        samples: see :func:`open_samples`.
        out: folder or URL; where there is no text-only instruction, no ``out/text`` is made.
        rule: what is a caption.
        skip_bad: leave samples out whose pictures are missing or do not decode; else the first one ends it.
        workers, size_limit: see :func:`opsin.data.write.write_dataset`.
        progress: called with what is being done (``read``, ``captions``, ``text``), how much of it is, and how much there is.
        resumed: called with a side and the number of its samples that are there already.

    Returns:
        The report, as it lies in ``split.json``.

    Raises:
        UserError: nothing gives a caption (nothing is written then), a sample is bad, or ``out`` holds something else.
    """
    from ... import __version__

    tell = progress or (lambda what, done, total: None)
    told = resumed or (lambda side, there: None)
    job = {"kind": "split-vift", "source": samples.digest, **rule.job()}
    if isinstance(samples, LlavaSource):
        job["images"] = str(samples.images.resolve())
    address = {side: join_address(out, side) for side in (CAPTIONS, TEXT)}
    note = {**job, "size_limit": size_limit, "opsin": __version__}
    if "images" in note:  # the note goes where the dataset goes: no path of this machine in it
        note["images"] = f"{stable_hash(note['images']):016x}"
    whole = {side: _whole(address[side], {**note, "side": side}) for side in address}
    found = survey(samples, rule, lambda done: tell("read", done, len(samples)))
    if not found.parts[CAPTIONS].numbers:
        raise nothing_generic(found)
    for side, part in found.parts.items():
        there = whole[side]
        if there is not None:
            told(side, there["samples"])
        elif part.numbers:
            total = len(part.numbers)
            written = write_dataset(
                address[side], SplitSource(samples, part.numbers, side, rule), {**job, "side": side},
                size_limit=size_limit, workers=workers, skip_bad=skip_bad,
                files=_noting({**note, "side": side}),
                progress=lambda done, side=side, total=total: tell(side, done, total),
                resumed=lambda number, side=side: told(side, number),
            )  # fmt: skip
            whole[side] = _noted(written)
    report = make_report(len(samples), found, rule, {side: (address[side], whole[side]) for side in address})
    _save(out, report)
    return report


def _noted(written: Written) -> dict[str, Any]:
    return {"samples": written.samples, "skipped": dict(written.skipped), "left_out": written.left_out}


def _noting(job: dict[str, Any]) -> Callable[[Written], dict[str, bytes]]:
    return lambda written: {NOTE: dumps({"job": job, **_noted(written)})}


def _whole(address: str, job: dict[str, Any]) -> dict[str, Any] | None:
    """The note of a dataset that is whole; None where there is none.

    Raises:
        UserError: it is another job's, or something else lies there.
    """
    if (work_folder(address) / "job.json").is_file():  # the writer goes on, or clears up
        return None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(address).expanduser()
        if "://" in address:
            folder = Path(temporary)
            try:  # what cannot be reached the writer will not reach, either
                for name in (NOTE, "index.json"):
                    fetch(address, name, folder / name)
            except UserError:
                return None
        elif not folder.is_dir() or all(path.name.startswith(WORK) for path in folder.iterdir()):
            return None
        elif not ((folder / NOTE).is_file() and (folder / "index.json").is_file()):
            raise UserError(f"{address}: not an empty folder; choose another one, or remove it")
        try:
            there = json.loads((folder / NOTE).read_bytes())
            made = dict(there["job"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{shown(address)}: {NOTE} is damaged ({first_line(error)}); remove the folder"
            ) from error
    for key in sorted(job):
        if made.get(key) != job[key]:
            raise UserError(
                f"{shown(address)}: is of another job ({key}: '{made.get(key)}', now '{job[key]}'); choose another folder, or "
                "remove it"
            )
    return there


def _save(out: str, report: Mapping[str, Any]) -> None:
    """Put the report beside the datasets.

    Raises:
        UserError: it cannot be written.
    """
    content = dumps(report)
    try:
        if "://" not in out:
            folder = Path(out).expanduser()
            partial = folder / f"{REPORT}.part"
            partial.write_bytes(content)
            partial.replace(folder / REPORT)
            return
        from streaming.base.storage.upload import CloudUploader

        with tempfile.TemporaryDirectory() as temporary:
            (Path(temporary) / REPORT).write_bytes(content)
            CloudUploader.get((temporary, out), exist_ok=True).upload_file(REPORT)
    except Exception as error:  # every store has its own errors
        raise UserError(f"{shown(out)}: {REPORT} cannot be written ({first_line(error)})") from error
