"""Data that a run makes for itself when it is not there yet (``prepare:``).

A folder is made once. The settings are written beside it, so that a run that asks for other data under the same
name is told so and does not train on the old.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from composer.utils import dist
from rich.console import Console

from ..models.errors import UserError
from .builders import check_arguments, construct
from .config import Loaded
from .registry import datasets as dataset_registry
from .run_folder import refuse_unwritable, write_atomically
from .schema import PrepareConfig

MARKER = "prepared.json"
"""Beside the index: the settings that a dataset was made with. Data made by hand has none."""

_DRAWN = ("seed", "split", "stream")
"""Keys of a spec of scenes that are no settings of the pictures."""


def scenes(out: str, split: str, samples: int, stream: str = "vqa", seed: int = 17, **config: Any) -> None:
    """Scenes (``opsin data scenes``): ``config`` are keys of ``data.scenes.SceneConfig``."""
    from ..data.scenes import SceneConfig, write

    write(out, config=SceneConfig(**config), seed=seed, split=split, stream=stream, samples=samples)


def easy_vqa(out: str, split: str, limit: int | None = None, yesno: int | None = None) -> None:
    """easy-vqa's packaged pictures and questions (needs ``opsin[real]``).

    ``yesno``: keep so many yes/no questions a picture; they are three quarters of the text.
    """
    from ..data.convert.easy_vqa import write

    write(out, split, limit=limit, yesno=yesno)


def prepare(loaded: Loaded, console: Console) -> None:
    """Make every dataset of ``prepare:`` whose folder is missing; rank 0 works, the others wait.

    Raises:
        UserError: on all ranks: a wrong spec (then nothing is made), or a folder that cannot be written.
    """
    refused: list[str | None] = [None]
    if dist.get_global_rank() == 0:
        try:
            refuse_specs(loaded)
            for kind, i, spec in _specs(loaded):
                _make(loaded, kind, i, spec, console)
        except UserError as error:
            refused = [str(error)]
        except OSError as error:
            refused = [f"prepare: {error}"]
    dist.broadcast_object_list(refused, src=0)
    if refused[0] is not None:
        raise UserError(refused[0])


def refuse_specs(loaded: Loaded) -> None:
    """Look at all of ``prepare:`` before any of it is made.

    Raises:
        UserError: a wrong key or value; a folder that was made otherwise, holds something else, or is asked for twice.
    """
    asked: dict[str, str] = {}
    for kind, i, spec in _specs(loaded):
        where = partial(_where, loaded, kind, i)
        out = spec.get("out")
        if not isinstance(out, str) or "://" in out:
            raise UserError(
                f"{where('out')}: a local folder is needed here; write to object storage with `opsin data {kind}`"
            )
        folder = os.path.normpath(out)
        if folder in asked:
            raise UserError(f"{where('out')}: '{out}' is already that of {asked[folder]}")
        asked[folder] = f"prepare.{kind}.{i}"
        settings = _settings(kind, spec, where)
        refuse_unwritable(Path(out), where("out"))
        if Path(out).is_dir() and any(Path(out).iterdir()):
            _refuse_other_data(Path(out), kind, settings, spec, where)


def _specs(loaded: Loaded) -> list[tuple[str, int, dict[str, Any]]]:
    config: PrepareConfig = loaded.run.prepare
    return [(k, i, spec) for k in ("scenes", "easy_vqa") for i, spec in enumerate(getattr(config, k))]


def _where(loaded: Loaded, kind: str, i: int, key: str) -> str:
    return loaded.where("prepare", kind, str(i), *([key] if key else []))


def _settings(kind: str, spec: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """A spec, checked, as plain data with every default filled in; what decides the data's content."""
    make = dataset_registry.get(kind, where(""))
    check_arguments(make, spec, where)
    parameters = inspect.signature(make).parameters.values()
    settings = {p.name: p.default for p in parameters if p.default is not p.empty}
    settings |= {key: value for key, value in spec.items() if key != "out"}
    if kind == "scenes":
        from ..data.scenes import SceneConfig, sample

        if settings["samples"] < 1:
            raise UserError(f"{where('samples')}: expected 1 or more, got {settings['samples']}")
        own = {key: settings.pop(key) for key in list(settings) if key not in ("samples", *_DRAWN)}
        config = construct(SceneConfig, own, where)
        try:
            sample(config, index=0, **{key: settings[key] for key in _DRAWN})
        except UserError as error:
            raise UserError(f"{where('')}: {error}") from error
        settings |= dataclasses.asdict(config)
    return json.loads(json.dumps(settings))


def _refuse_other_data(
    folder: Path, kind: str, settings: dict[str, Any], spec: Mapping[str, Any], where: Callable[[str], str]
) -> None:
    if not (folder / "index.json").is_file():
        raise UserError(f"{where('out')}: '{folder}' holds no dataset (no index.json); give another folder")
    if not (folder / MARKER).is_file():
        return  # made by hand: used as it is
    try:
        made: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where('out')}: cannot read {folder / MARKER}: {error}") from error
    now = {"kind": kind, **settings}
    # What this version added since then matters only where it is asked for.
    other = [k for k in now if (made[k] != now[k] if k in made else k in spec)]
    if other:
        said = ", ".join(f"{k}={made.get(k)!r} there, {now[k]!r} here" for k in other)
        raise UserError(
            f"{where('out')}: '{folder}' was made with other settings ({said}); give another folder, or remove it"
        )


def _make(loaded: Loaded, kind: str, i: int, spec: dict[str, Any], console: Console) -> None:
    out = Path(spec["out"])
    if (out / "index.json").is_file():
        return
    where = partial(_where, loaded, kind, i)
    make, settings = dataset_registry.get(kind, where("")), _settings(kind, spec, where)
    console.print(f"making {out} ({', '.join(f'{k}={v}' for k, v in spec.items() if k != 'out')})")
    unfinished = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        construct(make, {**spec, "out": str(unfinished)}, where)
        write_atomically(unfinished / MARKER, json.dumps({"kind": kind, **settings}, indent=1) + "\n")
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
