"""Checkpoints in two forms, and the way from one to the other.

whole     one file, ``ep0-ba8-rank0.pt``: what one process and DDP write
sharded   a folder, ``ep0-ba8/``, of ``.distcp`` files and ``.metadata``: what FSDP2 writes

Both hold the same nested state. Composer loads only the form that it would write, so that a run could not go on
with or without FSDP2; here the other form is converted on the way (:func:`in_form`, through ``compat.apply``), and
for keeps by ``opsin checkpoint convert``. Nothing in a checkpoint is run while it is read (``training.compat``).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist, maybe_create_object_store_from_uri, parse_uri
from torch.distributed.checkpoint.api import CheckpointException

from ..models.errors import UserError, user_error_in
from . import compat

WHOLE, SHARDED = "whole", "sharded"
METADATA = ".metadata"
LATEST = "latest-rank0.pt"
"""Composer's link to the newest checkpoint of a folder, in both forms."""


def form_of(path: str | Path) -> str | None:
    """``whole``, ``sharded``, or None: neither is there."""
    path = Path(path)
    if path.is_dir():
        return SHARDED if (path / METADATA).is_file() else None
    return WHOLE if path.is_file() else None


def convert(source: str | Path, to: str | Path) -> str:
    """Write a checkpoint in the form that it does not have. Tensors and numbers are the same to the bit.

    Run it in one process; that one holds the whole checkpoint in memory.

    Args:
        source: a file or a folder, or a link to one.
        to: must not exist; it is there whole or not at all.

    Returns:
        the new form.

    Raises:
        UserError: no checkpoint, one that would run code, no room, or ``to`` exists.
    """
    source, to = Path(source), Path(to)
    form = form_of(source)
    if form is None:
        raise UserError(f"{source}: no checkpoint (a file ….pt, or a folder with {METADATA})")
    if to.exists():
        raise UserError(f"{to}: exists; name a new file or folder")
    to.parent.mkdir(parents=True, exist_ok=True)
    _refuse_full_disk(source, to.parent)
    partial = to.with_name(f".{to.name}.{os.getpid()}.part")
    try:
        (_write_whole if form == SHARDED else _write_sharded)(source.resolve(), partial)
        partial.rename(to)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
    return WHOLE if form == SHARDED else SHARDED


def _write_whole(source: Path, to: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    compat.safe()
    dcp_to_torch_save(source, to)


def _write_sharded(source: Path, to: Path) -> None:
    import torch.distributed.checkpoint as dcp

    writer = dcp.FileSystemWriter(to)  # pyright: ignore[reportPrivateImportUsage]
    dcp.save(read(source), storage_writer=writer, no_dist=True)  # pyright: ignore[reportPrivateImportUsage]


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint's nested state, tensors whole and on the CPU; no code of it is run.

    Args:
        path: in either form.

    Raises:
        UserError: it would run code (unless ``compat.apply(trust_checkpoints=True)``), or is none.
    """
    path = Path(path)
    if form_of(path) == SHARDED:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole.pt"
            _write_whole(path, whole)
            return read(whole)
    try:
        body = compat.load_file(path)
    except (RuntimeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(body, dict):
        raise UserError(f"{path}: no checkpoint of Composer")
    return body


def _size(path: Path) -> int:
    return (
        sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        if path.is_dir()
        else path.stat().st_size
    )


def _refuse_full_disk(source: Path, folder: Path) -> None:
    needed, free = _size(source), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{source}: {needed / 1e9:.1f} GB are needed in {folder} to convert it, and {free / 1e9:.1f} GB are free"
        )


# Loading what another layout has written


@contextlib.contextmanager
def in_form(path: str, sharded: bool, store: Any = None) -> Iterator[tuple[str, Any]]:
    """A checkpoint in the form that this run loads; all ranks call it, and its copy is gone afterwards.

    Each node makes a copy of its own, beside the checkpoint where it can be written there, else in the system's
    folder for temporary files (``$TMPDIR``).

    Args:
        path: local, or the name of an object in ``store``; ``{rank}`` stands for rank 0.
        sharded: whether the run loads the sharded form.
        store: Composer's object store, or None.

    Yields:
        path and store for Composer: the ones given, unless it has to be converted.

    Raises:
        UserError: on all ranks, when it cannot be converted on one.
    """
    path = path.format(rank=0, local_rank=0, node_rank=0) if "{" in path else path
    found: list[Any] = [_form_and_place(path, store) if dist.get_global_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    form, place = found[0]
    if form is None or (form == SHARDED) == sharded:
        yield path, store
        return
    folder = result = None
    try:
        if dist.get_local_rank() == 0:
            try:
                folder = tempfile.mkdtemp(prefix=".opsin-converted-", dir=None if store else _writable(place))
                result = _converted(place, store, Path(folder))
            except (Exception, CheckpointException) as error:  # that one is no Exception
                line = str(error).splitlines()[0] if str(error) else type(error).__name__
                result = user_error_in(error) or UserError(f"{path}: cannot be converted: {line}")
        results: list[Any] = dist.all_gather_object(result)  # else the other ranks would wait for this one
        for error in results:
            if isinstance(error, UserError):
                raise error
        yield results[dist.get_global_rank() - dist.get_local_rank()], None
        dist.barrier()  # nobody reads it any more
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _form_and_place(path: str, store: Any) -> tuple[str | None, str]:
    if store is None:
        return form_of(path), str(Path(path).resolve())
    from composer.utils import extract_path_from_symlink

    if path.endswith(".symlink"):
        path = extract_path_from_symlink(path, store)
    for form, name in ((SHARDED, f"{path.rstrip('/')}/{METADATA}"), (WHOLE, path)):
        with contextlib.suppress(FileNotFoundError):
            store.get_object_size(name)
            return form, path
    return None, path


def _writable(place: str) -> str | None:
    parent = Path(place).parent
    return str(parent) if os.access(parent, os.W_OK) else None


def _converted(place: str, store: Any, folder: Path) -> str:
    """Bring a checkpoint here and give it the other form; returns the path."""
    source = Path(place)
    if store is not None:
        source = folder / "given"
        objects = [
            n for n in store.list_objects(place) if n == place or n.startswith(place.rstrip("/") + "/")
        ]
        for name in objects:
            to = source if name == place else source / name[len(place.rstrip("/")) + 1 :]
            to.parent.mkdir(parents=True, exist_ok=True)
            store.download_object(name, str(to))
    to = folder / "converted"
    convert(source, to)
    if store is not None:
        shutil.rmtree(source, ignore_errors=True)
    return str(to)


# Where a run goes on


def before_resuming(folder: str, sharded: bool) -> str | None:
    """What Composer's search for the newest checkpoint does not find; all ranks call it before a Trainer is made.

    * In a folder: it takes its link to the newest checkpoint away before it makes the next one, and a run that dies
      in between would begin anew. The link is made again, to the newest checkpoint that is complete.
    * In an object store: without FSDP2 it passes over a sharded checkpoint and would begin anew.

    Args:
        folder: where the stage's checkpoints are, a folder or a URL.
        sharded: whether the run loads the sharded form.

    Returns:
        a ``load_path`` for when Composer finds nothing, or None.
    """
    found: list[str | None] = [None]
    if dist.get_global_rank() == 0:
        if "://" not in folder:
            _mend_latest(Path(folder))
        elif not sharded:
            found = [_sharded_in_store(folder)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def _mend_latest(folder: Path) -> None:
    latest = folder / LATEST
    if latest.exists() or not folder.is_dir():
        return
    complete = [
        (int(batch.group(1)), path.name)
        for path in folder.iterdir()
        if (batch := re.match(r"ep\d+-ba(\d+)(-rank0\.pt)?$", path.name))
        and (form_of(path) == SHARDED or (path.is_file() and zipfile.is_zipfile(path)))
    ]
    if complete:
        latest.unlink(missing_ok=True)  # it may point to what is gone
        latest.symlink_to(max(complete)[1])


def _sharded_in_store(folder: str) -> str | None:
    from composer.utils import extract_path_from_symlink

    store = maybe_create_object_store_from_uri(folder)
    prefix = parse_uri(folder)[2].strip("/")
    if store is None:
        return None
    try:
        place = extract_path_from_symlink(f"{prefix}/{LATEST}.symlink", store)
    except FileNotFoundError:
        return None
    return store.get_uri(place) if _form_and_place(place, store)[0] == SHARDED else None


def summary(path: str | Path) -> str:
    """One line on a checkpoint: how far the training had come, on how many ranks, with which methods."""
    state = read(path)["state"]
    clock, facts = state["timestamp"]["Timestamp"], state.get("metadata", {})
    tensors = sum(isinstance(v, torch.Tensor) for v in state["model"].values())
    methods = [name for name, _ in state.get("algorithms", [])]
    return (
        f"epoch {clock['epoch']}, batch {clock['batch']}, {tensors} tensors, "
        f"written by {facts.get('world_size', '?')} rank(s), algorithms: {', '.join(methods) or 'none'}"
    )
