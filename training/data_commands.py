"""``opsin data ...``: make datasets, count their sentences, look into them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..data.messages import shown
from ..data.schema import IMAGE_MARK
from ..data.sentences import SIDECAR, SentenceCounts, dataset_hash
from .builders import construct


def scenes(
    out: str, samples: int, split: str, stream: str, seed: int, settings: list[str], workers: int
) -> None:
    """Write scenes, with a progress bar."""
    from ..data.scenes import SceneConfig, write

    chosen: Any = OmegaConf.to_container(OmegaConf.from_dotlist(settings))
    config = construct(SceneConfig, chosen, lambda key: f"--set {key}" if key else "--set")
    with Progress(transient=True) as bar:
        progress, resumed = _told(bar, out, samples)
        counts = write(
            out, config=config, seed=seed, split=split, stream=stream, samples=samples, workers=workers,
            progress=progress, resumed=resumed,
        )  # fmt: skip
    print(f"{samples} samples in {shown(out)}, {counts.turns} user turns with pictures")


def easy_vqa(out: str, split: str, limit: int | None, yesno: int | None, workers: int) -> None:
    """Write easy-VQA, with a progress bar."""
    from ..data.convert.easy_vqa import EasyVQASource, write

    total = len(EasyVQASource(split, limit=limit))
    with Progress(transient=True) as bar:
        progress, resumed = _told(bar, out, total)
        written = write(
            out, split, limit=limit, yesno=yesno, workers=workers, progress=progress, resumed=resumed
        )
    print(f"{written} samples in {shown(out)}")


def llava(file: str, images: str, out: str, limit: int | None, skip_bad: bool, workers: int) -> None:
    """Write LLaVA's JSON and its pictures, with a progress bar."""
    from ..data.convert.llava import LlavaSource, write
    from ..data.write import SKIPPED

    source = LlavaSource(file, images, limit=limit)
    with Progress(transient=True) as bar:
        progress, resumed = _told(bar, out, len(source))
        written = write(out, source, skip_bad=skip_bad, workers=workers, progress=progress, resumed=resumed)
    print(f"{written.samples} samples in {shown(out)}, {written.counts.turns} user turns with pictures")
    if source.renamed:
        print(f"{len(source.renamed)} samples had no id, or another's, and got one with their position")
    if source.unmarked:
        print(
            f"{source.unmarked} samples had pictures and no {IMAGE_MARK}; it was put in front of the question"
        )
    if written.skipped:
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(written.skipped.items()))
        print(f"{written.skipped.total()} samples left out ({reasons}); they are named in {SKIPPED}")


def _told(bar: Progress, out: str, total: int) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """What a writer tells: how far it is, and how much is there already."""
    task = bar.add_task(shown(out), total=total)

    def progress(done: int) -> None:
        bar.update(task, completed=done)

    def resumed(there: int) -> None:
        said = f"{shown(out)}: {there} samples are there already"
        bar.console.print(said, highlight=False, markup=False, soft_wrap=True)

    return progress, resumed


def templates(remote: str, top: int, console: Console) -> None:
    """Read all user turns of samples with pictures, write ``sentences.json`` beside the index, show the frequent ones."""
    from ..data.streaming import StreamingVLMDataset

    dataset = StreamingVLMDataset(remote=remote, batch_size=1, shuffle=False)
    stream = dataset.streams[0]
    index = Path(stream.local) / stream.split / "index.json"
    counts = SentenceCounts(dataset=dataset_hash(index.read_bytes()))
    with Progress(transient=True) as bar:
        for i in bar.track(range(dataset.num_samples), description=remote):
            conversation = dataset[i]["conversations"]
            if any(IMAGE_MARK in t.get("value", "") for t in conversation):
                counts.add(conversation)
    if stream.remote is None:
        counts.save(index.with_name(SIDECAR))
    else:
        _upload(counts, remote)
    table = Table(
        title=f"{remote}: {counts.turns} user turns, {len(counts.counts)} different sentences",
        title_justify="left",
    )
    for column in ("turns", "share of words", "sentence"):
        table.add_column(column, justify="left" if column == "sentence" else "right")
    for sentence, count in counts.counts.most_common(top):
        share = count * len(sentence.split()) / max(counts.words, 1)
        table.add_row(str(count), f"{share:.1%}", sentence)
    console.print(table)


def _upload(counts: SentenceCounts, remote: str) -> None:
    from streaming.base.storage.upload import CloudUploader

    with tempfile.TemporaryDirectory() as folder:
        counts.save(Path(folder) / SIDECAR)
        uploader = CloudUploader.get((folder, remote), exist_ok=True)
        uploader.upload_file(SIDECAR)
