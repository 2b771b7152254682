"""Stages of a run: what each one is made of, and the name under which its result can be used again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .. import __version__
from ..data.sentences import SIDECAR
from ..models.errors import UserError, nearest
from .builders import RESERVED, enabled_algorithms, stage_names, stages_of
from .config import STAGE_KEYS, Loaded, _Checker, to_plain
from .init_weights import is_checkpoint
from .registry import algorithms as algorithm_registry
from .schema import InitFrom, StageConfig

_WITHOUT_EFFECT = ("eval_loaders", "eval_interval")
"""Keys that do not change what a stage learns."""
_CALLBACKS_WITHOUT_EFFECT = ("loss_ledger", "non_finite")
"""What only watches; of ``non_finite``, that a run may go on past a bad batch with another policy."""
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
        return loaded.provenance.where_in_stage(self.path, key)


def resolve(loaded: Loaded) -> list[Stage]:
    """Stages of a run in order; each starts from the one before unless it says otherwise (``init_from``, ``from``)."""
    run = loaded.run
    checker = _Checker(loaded.provenance)
    defaults = {key: loaded.plain[key] for key in STAGE_KEYS if key in loaded.plain}
    if run.load_path and len(stage_names(run)) > 1:
        raise UserError(
            f"{loaded.where('load_path')}: goes with one stage, this run has several; to start from weights use "
            "init_from, to resume give the same command again"
        )
    stages: list[Stage] = []
    for name in stage_names(run):
        flat = not run.stages
        path = () if flat else ("stages", name)
        own = {} if flat else dict(loaded.plain["stages"][name] or {})
        # The run's init_from starts its first stage; the others start from the one before.
        merged = _deep({k: v for k, v in defaults.items() if k != "init_from" or not stages}, own)
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


def resolved_yaml(loaded: Loaded) -> str:
    """The configuration as YAML, every default filled in and every stage written out: loading it gives the same run."""
    plain = to_plain(loaded.run)
    if loaded.run.stages:
        plain = {k: v for k, v in plain.items() if k not in STAGE_KEYS}
        plain["stages"] = {s.name: to_plain(s.config) for s in resolve(loaded)}
    return OmegaConf.to_yaml(OmegaConf.create(plain))


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
        start = [earlier.identity if earlier else _content(stage.start.path), stage.start.heads]
    body = {
        "opsin": __version__,
        "seed": loaded.run.seed,
        "precision": loaded.run.precision,
        "model": _content(loaded.run.model),
        "load_path": _content(loaded.run.load_path),
        "callbacks": {k: v for k, v in loaded.run.callbacks.items() if k not in _CALLBACKS_WITHOUT_EFFECT},
        "stage": settings,
        "algorithms": {
            name: {k: _content(v) for k, v in keywords.items() if k not in RESERVED}
            for name, keywords in sorted(enabled_algorithms(loaded).items())
            if stage.name in stages_of(loaded, name, keywords, algorithm_registry.get(name, name))
        },
        "start": start,
    }
    return hashlib.blake2b(json.dumps(body, sort_keys=True, default=str).encode(), digest_size=10).hexdigest()


def _content(value: Any) -> Any:
    """A keyword, and beside the name of a file or model folder what is in it now, so that a change is noticed."""
    if isinstance(value, dict):
        return {k: _content(v) for k, v in value.items()}
    if not isinstance(value, str) or len(value) > 1000 or "\n" in value:
        return value
    path = Path(value)
    if path.is_file():
        return [value, _digest(path)]
    if (path / "config.json").is_file():
        return [value, [[p.name, _digest(p)] for p in sorted(path.iterdir()) if p.is_file()]]
    return value


def _digest(path: Path) -> str:
    """Of what is in a file; of a large one its size and time of change."""
    if path.stat().st_size > 1 << 26:
        return f"{path.stat().st_size} bytes of {path.stat().st_mtime_ns}"
    return hashlib.blake2b(path.read_bytes(), digest_size=10).hexdigest()


def dataset_content(dataset: dict[str, Any]) -> list[str]:
    """Hashes of the indexes and sentence counts of local datasets, so that data made anew is noticed; remote ones by address."""
    streams = [dataset] if dataset.get("remote") else []
    streams += list((dataset.get("streams") or {}).values())
    content = []
    for stream in streams:
        folder = Path(str(stream.get("remote"))) / (stream.get("split") or "")
        found = [_digest(folder / f) for f in ("index.json", SIDECAR) if (folder / f).is_file()]
        content.append("+".join(found) or str(folder))
    return content


def _with_heads(model: Path) -> Path:
    """A run's model, as its last stage left it: with the methods' heads, which the copy for use has no more."""
    order = model.parent / "stages.json"
    if not order.is_file():
        return model
    last = model.parent / "stages" / list(json.loads(order.read_text()))[-1] / "model"
    return last if (last / "config.json").is_file() else model


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
            return _with_heads(candidate)
    if is_checkpoint(Path(start.path)):
        return Path(start.path)
    known = [*stages, *(p.name for p in run_root.glob("*") if p.is_dir())] if run_root.is_dir() else stages
    raise UserError(
        f"init_from '{start.path}': no stage, run, checkpoint or folder with a model{nearest(start.path, known)}"
    )
