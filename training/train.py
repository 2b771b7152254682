"""A whole run: data made if missing, stages trained in order, the last model scored."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

from composer.utils import dist, reproducibility
from rich.console import Console

from ..models.errors import UserError
from . import compat, wall_time
from .builders import used_nowhere
from .check import refuse_mistakes
from .compatibility_check import print_warnings
from .config import Loaded
from .prepare import prepare
from .run_folder import RunFolder
from .scoring import check_evaluation, evaluate, write_summary
from .stage_run import copy_model, train_stage
from .stages import Stage, resolve


def train(loaded: Loaded, console: Console | None = None) -> RunFolder:
    """Run all stages of a configuration; every rank calls this.

    Finished stages are skipped; a stage before the last that another run of the same folder has finished with
    the same settings, data and start is taken from there (``reuse_stages``;
    the last one with ``reuse_last_stage`` alone: a run under a new name is meant to be trained).

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
    check_evaluation(loaded)  # it is read when training ends, which is late to learn that it is not there
    stages = resolve(loaded)
    folder = RunFolder(run.run_root, run.run_name)
    _on_rank_zero(lambda: folder.open(loaded, stages))
    _on_rank_zero(lambda: wall_time.begin(folder, started))
    names = [s.name for s in stages]
    print_warnings(console, used_nowhere(loaded))
    done: dict[str, Any] = {}
    for stage in stages:
        model = folder.finished(stage)
        if model is None and run.reuse_stages and (run.reuse_last_stage or stage is not stages[-1]):
            model = folder.shared(stage)
            if model is not None:
                console.print(f"stage {stage.name}: taken from {model} (same settings, data and start)")
                _on_rank_zero(lambda stage=stage, model=model: _take(folder, stage, model))
        elif model is not None:
            console.print(f"stage {stage.name}: finished before")
        if model is None:
            result = train_stage(loaded, stage, folder, names, console)
            dist.barrier()  # the stage's datasets are gone on all ranks before the next ones are made
            done[stage.name] = {"steps": result.steps, "seconds": round(result.seconds, 1)}
    last = stages[-1]
    model_folder = folder.finished(last)
    assert model_folder is not None
    _on_rank_zero(lambda: copy_model(model_folder, folder.model))
    if run.evaluation is not None:
        evaluate(loaded, last, folder, run.evaluation, console, stages=done)
    elif dist.get_global_rank() == 0:
        write_summary(folder, loaded, {}, done)
    dist.barrier()
    return folder


def _take(folder: RunFolder, stage: Stage, model: Path) -> None:
    from shutil import copytree, rmtree

    target = folder.stage(stage.name) / "model"
    partial = target.with_name("model.partial")
    for old in (partial, target):
        rmtree(old, ignore_errors=True)
    copytree(model, partial)
    partial.rename(target)  # whole, or not there: other runs look for it
    folder.mark_finished(stage, target, taken_from=str(model))


def _on_rank_zero(work: Any) -> None:
    """Do something on rank 0; if it refuses, all ranks stop."""
    error: list[UserError | None] = [None]
    if dist.get_global_rank() == 0:
        try:
            work()
        except UserError as refused:
            error = [refused]
        except OSError as failed:  # a full disk: the other ranks must not wait
            error = [UserError(f"{failed.filename or 'run folder'}: {failed.strerror or failed}")]
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]
