"""``opsin reconstruct``: what a finished run's ROSS head reads off the language model, in numbers and in pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..algorithms.ross.diffusion import ignoring_the_condition
from ..algorithms.ross.ross import ROSS
from ..algorithms.ross.sampling import conditions, reconstruct, strip, targets_shown
from ..algorithms.ross.targets import Target
from ..data.batch import split_batch, to_device
from ..data.streaming import StreamingVLMDataset
from ..evaluation.condition_gain import CONDITIONS, ConditionCurve, condition_curve
from ..models.errors import UserError
from ..models.export import load_model
from ..models.vlm import VisionLanguageModel
from .builders import algorithms_of_stage
from .finished import open_run
from .run_folder import write_atomically
from .schema import DatasetConfig
from .scoring import with_dataset
from .stage_data import build_collator

BATCH = 32
"""Pictures looked at together; each one's "another" is taken from the same batch."""


def reconstruct_run(
    path: Path, remote: str | None, limit: int, times: int, pictures: int, steps: int, console: Console
) -> ConditionCurve:
    """Measure the condition curve, print it, and write ``ross.json`` and ``ross.png`` into the run's folder.

    Args:
        path: folder of a finished run.
        remote: dataset with held-out pictures; None: the run's evaluation data.
        limit: pictures to measure on.
        times: at how many times, evenly spread.
        pictures: rows of the strip.
        steps: evaluations of the denoiser a reconstruction.

    Raises:
        UserError: the run has no ROSS in its last stage, or no data to look at.
    """
    loaded, stage, folder = open_run(path)
    ross = algorithms_of_stage(loaded, stage.name, stage.config).get(ROSS.name)
    if not isinstance(ross, ROSS) or ross.is_off():
        raise UserError(f"{path}: stage {stage.name} was trained without ross")
    for name, value in (
        ("--limit", limit - 1),
        ("--times", times),
        ("--pictures", pictures),
        ("--steps", steps),
    ):
        if value < 1:
            raise UserError(f"{name}: use {2 if name == '--limit' else 1} or more")
    evaluation = loaded.run.evaluation
    if remote is None and evaluation is None:
        raise UserError(f"{path}: the run names no evaluation data; give --remote FOLDER")
    source = evaluation.dataset if remote is None and evaluation is not None else DatasetConfig(remote=remote)
    model = load_model(
        folder.stage(stage.name) / "model",
        bidirectional_images=loaded.run.model.get("bidirectional_images"),
        attn_implementation=loaded.run.model.get("attn_implementation"),
    ).eval()
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    ross.restore(model, loaded.run.seed)
    samples = with_dataset(source, loaded.run.seed, lambda dataset: list(islice(_distinct(dataset), limit)))
    if len(samples) < 2:
        raise UserError(f"{source.remote}: needs two different pictures or more")
    batches = list(_batches(model, build_collator(model, stage, stage.config.train_loader), samples))
    grid = [round((i + 0.5) * ross.timesteps / times) for i in range(times)]
    curve = condition_curve(model, ross, batches, grid)
    _print(console, curve)
    record = {"run": loaded.run.run_name, "stage": stage.name, "data": source.remote, **curve.as_dict()}
    write_atomically(folder.path / "ross.json", json.dumps(record, indent=1))
    if type(ross.built_target).decode is not Target.decode:
        draw(model, ross, batches[0], pictures, steps).save(folder.path / "ross.png")
        console.print(f"strip: {folder.path / 'ross.png'}", soft_wrap=True)
    return curve


def draw(model: VisionLanguageModel, ross: ROSS, batch: dict[str, Any], pictures: int, steps: int) -> Any:
    """Strip of the first views of a batch: picture, target, and what is sampled under each condition."""
    right = conditions(model, ross, batch)
    views = len(batch["grids"])
    start = [0, *torch.tensor([r * c for r, c in batch["grids"]]).cumsum(0).tolist()]
    same = batch["grids"][0] == batch["grids"][-1]
    other = torch.cat([right[start[i] : start[i + 1]] for i in [*range(1, views), 0]]) if same else None
    shown = {"right": right, "another's": other, "zero": torch.zeros_like(right)}
    columns = {"picture": model.pictures(batch), "target": targets_shown(model, ross, batch)}
    columns.update({n: reconstruct(model, ross, batch, c, steps) for n, c in shown.items() if c is not None})
    return strip({title: column[:pictures] for title, column in columns.items()})


def _distinct(dataset: StreamingVLMDataset) -> Iterator[dict[str, Any]]:
    """Samples with pictures that were not seen before."""
    seen = set()
    for i in range(dataset.num_samples):
        sample = dataset[i]
        if len(sample["images"]) > 4 and sample["images"] not in seen:
            seen.add(sample["images"])
            yield sample


def _batches(
    model: VisionLanguageModel, collator: Any, samples: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    device = next(model.net.hf.parameters()).device
    for start in range(0, len(samples), BATCH):
        chunk = samples[start : start + BATCH]
        if len(chunk) == 1:
            chunk = samples[start - 1 : start + 1]
        batch = split_batch(collator(chunk), None, training=False)[0]
        batch.pop("patch_targets", None)  # measured against the pictures themselves
        yield to_device(batch, device)


def _print(console: Console, curve: ConditionCurve) -> None:
    table = Table(
        title=f"reconstruction loss, {len(curve.loss['right'])} held-out views", title_justify="left"
    )
    for column in ("time", *CONDITIONS, "ignoring it*"):
        table.add_column(column, justify="right")
    for i, time in enumerate(curve.times):
        white = "" if curve.ignoring is None else f"{curve.ignoring[i]:.3f}"
        table.add_row(str(time), *(f"{curve.loss[n][:, i].mean():.4f}" for n in CONDITIONS), white)
    means = (f"{curve.loss[n].mean():.4f}" for n in CONDITIONS)
    table.add_row(
        "mean", *means, "" if curve.ignoring is None else f"{curve.ignoring.mean():.3f}", style="bold"
    )
    console.print(table)
    gain, half = curve.gain()
    console.print(f"condition gain (another's minus right): {gain:.4f} +- {half:.4f} (95 %)")
    if curve.ignoring is not None:
        console.print(
            f"* alpha-bar: what ignoring the condition costs on white targets (mean over all times {ignoring_the_condition():.3f}); "
            "targets that are not white can be guessed better without it, so read the differences"
        )
