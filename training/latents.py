"""``opsin data latents`` and ``features``: what a method predicts of each patch, computed once and stored."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.cells import cells_of, columns_of, row_of
from ..data.messages import first_line
from ..data.patch_targets import COLUMN, DESCRIPTION, PatchTargetsInfo
from ..data.remote import read_sentence_counts
from ..data.sentences import SIDECAR, dataset_hash
from ..data.shards import AT_ONCE, ShardWriter
from ..data.streaming import StreamingVLMDataset
from ..models.anatomy import Pictures, anatomy_of, image_encoder_for
from ..models.errors import UserError, nearest
from ..models.export import load_processor
from ..models.geometry import ImageEncoder, geometry_id
from .picture_targets import PictureTargetsMaker
from .registry import models as model_registry
from .registry import patch_targets as target_registry

Shows = Callable[[dict[str, torch.Tensor], Any], Pictures]


class _OnlyConfig:
    """Stands in for a model where its configuration is enough."""

    def __init__(self, config: Any):
        self.config = config


def open_pictures(source: str) -> tuple[ImageEncoder, Shows]:
    """How a model takes pictures, and what its tower sees of them; no weights are loaded.

    Args:
        source: run folder, model folder, hub name, or a registered model that needs no keywords.

    Raises:
        UserError: no such thing.
    """
    path = Path(source)
    if source in model_registry.names() and not path.exists():
        try:
            built = model_registry.get(source, "--model")()
        except TypeError as error:
            raise UserError(f"--model {source}: needs keywords; give a run or model folder") from error
        processor, config = built.processor, built.hf.config
    else:
        if (path / "config.yaml").is_file():
            from .finished import open_run

            path = open_run(path)[2].model
        elif not path.is_dir() and (path.is_absolute() or source.startswith(".")):
            raise UserError(f"--model {source}: no run folder, no model folder")
        try:
            processor, config = load_processor(path if path.is_dir() else source)
        except UserError as error:
            raise UserError(f"{error}{nearest(source, model_registry.names())}") from error
    return image_encoder_for(processor, config), anatomy_of(_OnlyConfig(config)).pictures


def make_target(method: str, kind: str, settings: Sequence[str]) -> Any:
    """The function to apply: ``identity``, ``moments_dim`` and ``moments(pictures, grids)``."""
    make = target_registry.get(method, "--method")
    chosen = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)))
    assert isinstance(chosen, dict)
    try:
        return make({**chosen, "name": kind} if chosen else kind, "--target")
    except (TypeError, ValueError, OSError) as error:
        raise UserError(f"--target {kind}: {first_line(error)}") from error


def latents(
    source: str,
    out: str,
    model: str,
    *,
    method: str = "ross",
    target: str = "vae",
    settings: Sequence[str] = (),
    sidecar: bool = False,
    device: str | None = None,
    threads: int = 4,
    console: Console | None = None,
    command: str = "latents",
) -> None:
    """Compute and store targets, with a progress bar; see :func:`write`.

    ``command``: as which it was typed; another one than ``latents`` implies its method, and is noted without it.
    """
    images, shows = open_pictures(model)
    made = make_target(method, target, settings)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    given = ["--model", model, *(["--method", method] if command == "latents" else []), "--target", target]
    given += [word for setting in settings for word in ("--set", setting)] + ["--sidecar"] * sidecar
    write(
        source, out, images, shows, made, name=method, sidecar=sidecar, device=where, threads=threads,
        command=shlex.join(["opsin", "data", command, source, out, *given]), console=console or Console(),
    )  # fmt: skip


def write(
    source: str,
    out: str,
    images: ImageEncoder,
    shows: Shows,
    target: Any,
    *,
    name: str,
    sidecar: bool,
    console: Console,
    device: torch.device | str = "cpu",
    threads: int = 4,
    command: str = "",
) -> None:
    """Write a dataset of stored targets, or go on where an earlier process left off.

    Args:
        source: dataset, folder or URL.
        out: new folder or URL; or what is left of the same job.
        images: how the model takes pictures.
        shows: (batch of pixels, processor) -> each view as the tower sees it.
        target: the function; see :func:`make_target`.
        name: the method whose targets they are.
        sidecar: write ids and targets alone; else rows are copied, byte for byte, and get one column more.
        console: for messages and the progress bar.
        device, threads: see ``data_app.data_latents``.
        command: noted in the description.

    Raises:
        UserError: ``out`` holds something else, the disk has no room, or the source cannot be read.
    """
    dataset = StreamingVLMDataset(remote=source, batch_size=1, shuffle=False, patch_targets="ignore")
    stream = dataset.streams[0]
    index = Path(stream.local) / stream.split / "index.json"
    info = PatchTargetsInfo(
        name=name, identity=target.identity, geometry=geometry_id(images), moments_dim=target.moments_dim,
        dataset=dataset_hash(index.read_bytes()), samples=int(dataset.num_samples), command=command,
    )  # fmt: skip
    writer = ShardWriter(
        out,
        {
            "dataset": info.dataset, "target": f"{name} {info.identity}", "geometry": info.geometry,
            "values": info.moments_dim, "sidecar": sidecar,
        },
    )  # fmt: skip
    maker = PictureTargetsMaker(images, shows, target, torch.device(device), threads)
    try:
        _make_room(dataset, source, out, writer, maker, sidecar, console)
        with _progress(console) as bar:
            task = bar.add_task(out, total=info.samples)
            start = 0
            for number, shard in enumerate(dataset.shards):
                if number not in writer.done:
                    rows = _rows(dataset, number, source)
                    told = _told(bar, task, start, len(rows))
                    cells = [cells_of(shard, row) for row in rows]
                    _write_shard(writer, number, shard, cells, maker, sidecar, told)
                start += len(shard)
                bar.update(task, completed=start)
        shards = writer.index()
        files = {
            DESCRIPTION: PatchTargetsInfo(**{**vars(info), "index": dataset_hash(shards)}).dumps().encode()
        }
        counts = None if sidecar else read_sentence_counts(stream)
        if counts is not None:
            counts.dataset = dataset_hash(shards)
            files[SIDECAR] = counts.dumps().encode()
        writer.finish(files)
    finally:
        writer.close()
        maker.close()
    console.print(
        f"{info.samples} samples in {out}; {maker.computed} pictures computed"
        + (
            f", {maker.unreadable} could not be read (training leaves them out, too)"
            if maker.unreadable
            else ""
        ),
        soft_wrap=True,
    )


def _write_shard(
    writer: ShardWriter,
    number: int,
    shard: Any,
    cells: list[dict[str, bytes]],
    maker: PictureTargetsMaker,
    sidecar: bool,
    told: Callable[[float], None],
) -> None:
    values = maker.packed([c["images"] for c in cells], told)
    columns = {"id": columns_of(shard)["id"]} if sidecar else columns_of(shard)
    fixed = [
        n for n, size in zip(shard.column_names, shard.column_sizes, strict=True) if size and n != COLUMN
    ]
    rows = [
        row_of({**{name: c[name] for name in columns}, COLUMN: value}, fixed)
        for c, value in zip(cells, values, strict=True)
    ]
    writer.write(number, {**columns, COLUMN: "bytes"}, rows)


def _rows(dataset: StreamingVLMDataset, number: int, source: str) -> list[bytes]:
    """The stored rows of a shard."""
    shard: Any = dataset.shards[number]
    try:
        dataset.prepare_shard(number)
        rows = [shard.get_sample_data(i) for i in range(len(shard))]
    except Exception as error:  # every store has its own errors
        raise UserError(f"{source}: shard {number} could not be read: {first_line(error)}") from error
    if not {"id", "images"} <= set(shard.column_names):
        raise UserError(f"{source}: shard {number} has no columns id and images; it has {shard.column_names}")
    return rows


def _make_room(
    dataset: StreamingVLMDataset,
    source: str,
    out: str,
    writer: ShardWriter,
    maker: PictureTargetsMaker,
    sidecar: bool,
    console: Console,
) -> None:
    """Say how much is going to be written, and refuse if a disk has no room for it."""
    total, samples, stream = len(dataset.shards), dataset.num_samples, dataset.streams[0]
    every = samples <= 256  # else: 32 samples of each of 8 shards stand for all
    values = count = 0
    for number in range(total) if every else sorted({i * total // 8 for i in range(8)}):
        shard, rows = dataset.shards[number], _rows(dataset, number, source)
        for row in rows if every else rows[:: max(1, len(rows) // 32)]:
            cells = cells_of(shard, row)
            values += maker.size(cells["images"]) + 12 + (len(cells["id"]) if sidecar else 0)
            count += 1
    copied = 0 if sidecar else sum(shard.get_raw_size() for shard in dataset.shards)
    size = copied + values * samples // count
    there = sum(len(dataset.shards[number]) for number in writer.done)
    console.print(
        f"{source}: {samples} samples in {total} shards; {'' if every else 'about '}{decimal(size)} to write to {out}"
        + (f", {there} samples in {len(writer.done)} shards are there already" if writer.done else ""),
        soft_wrap=True,
    )
    # A remote dataset leaves few shards at a time here; a remote source stays in its cache.
    left = total - len(writer.done)
    needs = [(writer.folder, size * (min(AT_ONCE, left) if writer.remote else left) // total)]
    if stream.remote is not None:
        files = [(Path(s.dirname) / s.split / s.raw_data.basename, s.raw_data.bytes) for s in dataset.shards]
        needs.append((Path(stream.local), sum(size for file, size in files if not file.is_file())))
    disks: dict[int, tuple[Path, int]] = {}
    for folder, need in needs:
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        disk = there.stat().st_dev
        disks[disk] = (there, need + disks.get(disk, (there, 0))[1])
    for there, need in disks.values():
        free = shutil.disk_usage(there).free
        if need > free:
            raise UserError(
                f"{out}: needs {decimal(need)} on the disk of '{there}', where {decimal(free)} are free"
            )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("samples"),
        TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip


def _told(bar: Progress, task: Any, start: int, samples: int) -> Callable[[float], None]:
    """Progress of one shard (share of it) -> of the bar."""
    return lambda share: bar.update(task, completed=start + int(share * samples))
