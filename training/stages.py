"""Stages of a run: what each one is made of, and the name under which its result can be used again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..models.errors import UserError, nearest
from .builders import RESERVED, enabled_algorithms, stage_names, stages_of
from .config import STAGE_KEYS, Loaded, _Checker, to_plain
from .init_weights import is_checkpoint
from .registry import algorithms as algorithm_registry
from .schema import InitFrom, StageConfig

_WITHOUT_EFFECT = ("eval_loaders", "eval_interval")
"""Keys that do not change what a stage learns."""
_LOADER_WITHOUT_EFFECT = ("num_workers", "prefetch_factor", "persistent_workers", "pin_memory", "timeout")
_DATASET_WITHOUT_EFFECT = (
    "local",
    "predownload",
    "cache_limit",
    "download_retry",
    "download_timeout",
    "validate_hash",
)


@dataclass
class Stage:
    """One stage, resolved.

    Attributes:
        name: as in the YAML.
        config: its keys, the run's defaults filled in.
        path: key path of its own section, for messages; empty when written flat.
        identity: hash of everything that its result depends on.
        start: where its weights come from: a model of ``model:`` (None), or another stage or folder.
    """

    name: str
    config: StageConfig
    path: tuple[str, ...]
    identity: str
    start: InitFrom | None

    def where(self, loaded: Loaded, *key: str) -> str:
        """Place of one of its keys, in its own section or among the run's defaults."""
        own = (*self.path, *key)
        place = loaded.provenance.where(own)
        if self.path and (place == loaded.provenance.where(self.path) or place == "configuration"):
            return loaded.where(*key)
        return f"{place}: {'.'.join(own)}"


def resolve(loaded: Loaded) -> list[Stage]:
    """Stages of a run in order; each starts from the one before unless it says otherwise (``init_from``, ``from``)."""
    run = loaded.run
    checker = _Checker(loaded.provenance)
    defaults = {key: loaded.plain[key] for key in STAGE_KEYS if key in loaded.plain}
    stages: list[Stage] = []
    for name in stage_names(run):
        flat = not run.stages
        path = () if flat else ("stages", name)
        own = {} if flat else dict(loaded.plain["stages"][name] or {})
        merged = _deep(defaults, own)
        config: StageConfig = checker.dataclass(StageConfig, merged, path)
        start = config.init_from
        if start is None and stages:
            start = InitFrom(path=stages[-1].name)
        if start is not None and start.heads not in ("keep", "drop", "new"):
            raise UserError(
                f"{loaded.where(*path, 'init_from', 'heads')}: '{start.heads}': use keep, drop or new"
            )
        stages.append(Stage(name, config, path, "", start))
        stages[-1].identity = _identity(loaded, stages[-1], stages[:-1])
    return stages


def _deep(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _deep(merged[key], value)
        else:
            merged[key] = value
    return merged


def _identity(loaded: Loaded, stage: Stage, before: list[Stage]) -> str:
    """Hash of what the stage learns from: its settings, its methods, its data, and where it starts."""
    settings = {k: v for k, v in to_plain(stage.config).items() if k not in (*_WITHOUT_EFFECT, "init_from")}
    loader = {k: v for k, v in settings["train_loader"].items() if k not in _LOADER_WITHOUT_EFFECT}
    dataset = {k: v for k, v in loader["dataset"].items() if k not in _DATASET_WITHOUT_EFFECT}
    loader["dataset"] = {**dataset, "content": dataset_content(dataset)}
    settings["train_loader"] = loader
    start: Any = None
    if stage.start is not None:
        earlier = next((s for s in before if s.name == stage.start.path), None)
        start = [earlier.identity if earlier else stage.start.path, stage.start.heads]
    body = {
        "opsin": __version__,
        "seed": loaded.run.seed,
        "precision": loaded.run.precision,
        "model": loaded.run.model,
        "stage": settings,
        "algorithms": {
            name: {k: v for k, v in keywords.items() if k not in RESERVED}
            for name, keywords in sorted(enabled_algorithms(loaded).items())
            if stage.name in stages_of(loaded, name, keywords, algorithm_registry.get(name, name))
        },
        "start": start,
    }
    return hashlib.blake2b(json.dumps(body, sort_keys=True, default=str).encode(), digest_size=10).hexdigest()


def dataset_content(dataset: dict[str, Any]) -> list[str]:
    """Hashes of the indexes of local datasets, so that data made anew is noticed; remote ones by address."""
    addresses = [dataset.get("remote")] if dataset.get("remote") else []
    addresses += [s.get("remote") for s in (dataset.get("streams") or {}).values()]
    content = []
    for address in filter(None, addresses):
        index = Path(str(address)) / (dataset.get("split") or "") / "index.json"
        content.append(
            hashlib.blake2b(index.read_bytes(), digest_size=10).hexdigest()
            if index.is_file()
            else str(address)
        )
    return content


def find_start(start: InitFrom, run_root: Path, run_folder: Path, stages: list[str]) -> Path:
    """What a stage starts from: a stage of this run, a run, ``run@stage``, a folder, or a Composer checkpoint.

    Raises:
        UserError: nothing is there; the line names what was tried.
    """
    name, _, stage = start.path.partition("@")
    candidates = [
        run_folder / "stages" / start.path / "model",
        Path(start.path),
        Path(start.path) / "model",
        run_root / name / ("stages/" + stage if stage else "") / "model",
        Path(name) / ("stages/" + stage if stage else "") / "model",
    ]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    if is_checkpoint(Path(start.path)):
        return Path(start.path)
    known = [*stages, *(p.name for p in run_root.glob("*") if p.is_dir())] if run_root.is_dir() else stages
    raise UserError(
        f"init_from '{start.path}': no stage, run, checkpoint or folder with a model{nearest(start.path, known)}"
    )
