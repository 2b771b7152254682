"""A whole run: data made if missing, stages trained in order, the last model scored."""

from __future__ import annotations

import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist, reproducibility
from rich.console import Console

from .. import __version__
from ..data.collate import VLMCollator
from ..evaluation.adapter import VLMAdapter
from ..evaluation.blind import Majority
from ..evaluation.scorecard import as_table, scorecard
from ..evaluation.sheet import sample_sheet
from ..models.errors import UserError
from ..models.export import load_model
from ..models.vlm import VisionLanguageModel
from . import compat
from .check import refuse_mistakes
from .config import Loaded
from .prepare import prepare
from .run_folder import RunFolder, write_atomically
from .schema import EvaluationConfig
from .stage_data import build_collator, build_dataset
from .stage_run import copy_model, train_stage
from .stages import Stage, resolve


def train(loaded: Loaded, console: Console | None = None) -> RunFolder:
    """Run all stages of a configuration; every rank calls this.

    Finished stages are skipped; a stage before the last that another run of the same folder has finished with
    the same settings, data and start is taken from there (``reuse_stages``).

    Returns:
        The run's folder.

    Raises:
        UserError: bad input; nothing that exists is lost.
    """
    compat.apply(trust_checkpoints=loaded.run.trust_checkpoint)
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings(
            "ignore", category=category, module=r"(composer|torch|streaming|transformers)\b.*"
        )
    run = loaded.run
    refuse_mistakes(loaded)  # before any process group exists, data is made or a stage trained
    checkpoint = run.load_path
    if checkpoint and "://" not in checkpoint and "{" not in checkpoint and not Path(checkpoint).exists():
        raise UserError(f"{loaded.where('load_path')}: no checkpoint at '{checkpoint}'")
    if dist.get_world_size() > 1 or run.parallelism_config:
        dist.initialize_dist(run.device, timeout=run.dist_timeout)
    console = console or Console(stderr=True, quiet=dist.get_global_rank() != 0)
    started = time.time()
    reproducibility.seed_all(run.seed)
    prepare(loaded, console)
    stages = resolve(loaded)
    folder = RunFolder(run.run_root, run.run_name)
    _on_rank_zero(lambda: folder.open(loaded, stages))
    names = [s.name for s in stages]
    done: dict[str, Any] = {}
    for stage in stages:
        model = folder.finished(stage)
        if model is None and run.reuse_stages and stage is not stages[-1]:
            model = folder.shared(stage)
            if model is not None:
                console.print(f"stage {stage.name}: taken from {model} (same settings, data and start)")
                _on_rank_zero(lambda stage=stage, model=model: _take(folder, stage, model))
        elif model is not None:
            console.print(f"stage {stage.name}: finished before")
        if model is None:
            result = train_stage(loaded, stage, folder, names, console)
            done[stage.name] = {"steps": result.steps, "seconds": round(result.seconds, 1)}
    last = stages[-1]
    model_folder = folder.finished(last)
    assert model_folder is not None
    _on_rank_zero(lambda: copy_model(model_folder, folder.model))
    if run.evaluation is not None and dist.get_global_rank() == 0:
        evaluate(loaded, last, folder, run.evaluation, console, stages=done, started=started)
    elif dist.get_global_rank() == 0:
        _write_summary(folder, loaded, {}, done, started)
    dist.barrier()
    return folder


def _take(folder: RunFolder, stage: Stage, model: Path) -> None:
    from shutil import copytree, rmtree

    target = folder.stage(stage.name) / "model"
    rmtree(target, ignore_errors=True)
    copytree(model, target)
    folder.mark_finished(stage, target, taken_from=str(model))


def _on_rank_zero(work: Any) -> None:
    """Do something on rank 0; if it refuses, all ranks stop."""
    error: list[UserError | None] = [None]
    if dist.get_global_rank() == 0:
        try:
            work()
        except UserError as refused:
            error = [refused]
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]


def evaluate(
    loaded: Loaded,
    stage: Stage,
    folder: RunFolder,
    config: EvaluationConfig,
    console: Console,
    *,
    stages: dict[str, Any] | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Score the run's last model, draw the sheet, write the summary (on one rank)."""
    model = load_model(folder.model)
    collator = build_collator(model, stage, stage.config.train_loader)
    samples = stored_samples(config, config.limit)
    majority = None
    if config.majority_from is not None:
        reference = build_dataset(config.majority_from, 1, loaded.run.seed)
        majority = Majority(reference[i] for i in range(reference.num_samples))
    card = scorecard(model, collator, samples, majority=majority, batch_size=config.batch_size)
    console.print(as_table(card, f"{loaded.run.run_name}: exact match on {len(samples)} held-out samples"))
    if config.pictures:
        draw_samples(model, collator, samples[: config.pictures], folder.samples)
    return _write_summary(folder, loaded, card, stages or {}, started)


def stored_samples(config: EvaluationConfig, limit: int | None) -> list[dict[str, Any]]:
    """Held-out samples, in the order of storage."""
    dataset = build_dataset(config.dataset, 1, 0)
    count = dataset.num_samples if limit is None else min(limit, dataset.num_samples)
    return [dataset[i] for i in range(count)]


def draw_samples(
    model: VisionLanguageModel, collator: VLMCollator, samples: list[dict[str, Any]], path: Path
) -> None:
    """Sheet of pictures with what the model says."""
    answers = VLMAdapter(model, collator, max_new_tokens=16).answers(samples)
    sample_sheet(samples, answers, path)


def _write_summary(
    folder: RunFolder, loaded: Loaded, card: dict[str, Any], stages: dict[str, Any], started: float | None
) -> dict[str, Any]:
    import transformers

    before = json.loads(folder.summary.read_text()) if folder.summary.is_file() else {}
    summary = {
        "run_name": loaded.run.run_name,
        "by_kind": {kind: row for kind, row in card.items() if kind != "all"},
        "all": card.get("all"),
        "scorer": "exact_match/1",
        "seed": loaded.run.seed,
        "stages": {**before.get("stages", {}), **stages},
        "seconds": None if started is None else round(time.time() - started, 1),
        "versions": {
            "opsin": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    write_atomically(folder.summary, json.dumps(summary, indent=1) + "\n")
    return summary
