"""Data that a run makes for itself when it is not there yet (``prepare:``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.utils import dist
from rich.console import Console

from ..models.errors import UserError
from .builders import construct
from .config import Loaded
from .registry import datasets as dataset_registry
from .schema import PrepareConfig


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
    """Make every dataset of ``prepare:`` whose folder is missing; rank 0 works, the others wait."""
    config: PrepareConfig = loaded.run.prepare
    for kind in ("scenes", "easy_vqa"):
        for i, spec in enumerate(getattr(config, kind)):
            _make(loaded, kind, i, spec, console)


def _make(loaded: Loaded, kind: str, i: int, spec: Mapping[str, Any], console: Console) -> None:
    where = lambda key: loaded.where("prepare", kind, str(i), *([key] if key else []))  # noqa: E731
    out = spec.get("out")
    if not isinstance(out, str) or "://" in out:
        raise UserError(
            f"{where('out')}: a local folder is needed here; write to object storage with `opsin data {kind}`"
        )
    if dist.get_global_rank() == 0 and not (Path(out) / "index.json").is_file():
        console.print(f"making {out} ({', '.join(f'{k}={v}' for k, v in spec.items() if k != 'out')})")
        partial = f"{out.rstrip('/')}.{os.getpid()}.partial"
        make = dataset_registry.get(kind, where(""))
        construct(make, {**spec, "out": partial}, where)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(partial).rename(out)
    dist.barrier()
