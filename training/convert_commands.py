"""``opsin data convert``: data of other kinds as MDS shards, on a disk or in object storage."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)


def convert_commands(app: typer.Typer) -> None:
    """Add the command to ``opsin data``."""
    app.command("convert")(convert)


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="LLaVA's JSON, a Hugging Face data set (folder, .parquet, .arrow), tars (folder, a-{00..09}.tar), JSON lines.",
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", help="New folder, or s3://bucket/folder. The same command goes on.")
    ],
    format_: Annotated[str, typer.Option("--format", help="auto, llava, hf, webdataset or jsonl.")] = "auto",
    images: Annotated[
        str | None, typer.Option(help="Folder where paths of pictures begin; default: the source's own.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="What columns mean: question=q,answer=a,image=img; also id, caption, conversations, messages, texts."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a Hugging Face data set with several.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most samples.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that make samples; 0: this one.")] = 0,
    max_bad: Annotated[
        float, typer.Option(help="Share of samples that may go into quarantine; more end it (exit code 2).")
    ] = 0.05,
    shard_size: Annotated[int, typer.Option(min=1, max=3800, help="Most MiB in a shard.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a picture of a URL.")] = 20.0,
    retries: Annotated[int, typer.Option(min=0, help="How often a URL is tried again.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="URLs that a process asks at once.")] = 16,
    private_hosts: Annotated[
        bool, typer.Option("--private-hosts", help="Also ask URLs of hosts that are not public.")
    ] = False,
) -> None:
    """Convert data of another kind; pictures keep their bytes, and what cannot be taken goes into quarantine.jsonl."""
    from ..data.convert.convert import QUARANTINE, open_source
    from ..data.convert.convert import convert as write
    from ..data.messages import shown

    opened = open_source(
        source, format_, images=images, columns=columns, split=split, limit=limit, timeout=timeout, retries=retries,
        private=private_hosts, threads=threads,
    )  # fmt: skip
    shape = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), MofNCompleteColumn())
    with Progress(*shape, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task(shown(out), total=len(opened.source))

        def progress(done: int) -> None:
            bar.update(task, completed=done)

        def resumed(there: int) -> None:
            said = f"{shown(out)}: {there} samples are there already"
            bar.console.print(said, highlight=False, markup=False, soft_wrap=True)

        written = write(
            out, opened, max_bad=max_bad, workers=workers, size_limit=shard_size << 20, progress=progress, resumed=resumed
        )  # fmt: skip
    print(
        f"{written.samples} samples in {shown(out)} ({opened.kind}), {written.counts.turns} user turns with pictures"
    )
    if opened.source.renamed:
        print(
            f"{len(opened.source.renamed)} samples had no id, or another's, and got one with their position"
        )
    if written.skipped:
        reasons = ", ".join(f"{n} {reason}" for reason, n in written.skipped.most_common())
        left = written.skipped.total()
        share = left / (left + written.samples)
        print(f"{left} samples in quarantine, {share:.2%} ({reasons}): {shown(out).rstrip('/')}/{QUARANTINE}")
