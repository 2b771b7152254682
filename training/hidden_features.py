"""``opsin hidden-features``: JARVIS's predictions of what was hidden, against cheaper guesses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..algorithms.jarvis import JARVIS
from ..evaluation.hidden_features import HiddenFeatures, measure
from ..models.errors import UserError
from .opened import OpenedMethod, distinct_pictures, open_method
from .run_folder import write_atomically
from .schema import DatasetConfig
from .scoring import with_dataset

BATCH = 32
"""Pictures looked at together; each one's other picture is the one before it."""

SAID = {
    "jarvis": "JARVIS",
    "mean": "mean at this place",
    "nearest": "feature of the nearest context patch",
    "linear_context": "linear, from context tokens",
    "linear_token": "linear, from the hidden token itself",
    "another": "JARVIS, another picture's features",
}


def hidden_features(
    path: Path,
    remote: str | None,
    *,
    training: str | None = None,
    fit: int = 2000,
    limit: int = 512,
    console: Console,
) -> HiddenFeatures:
    """Measure, print the table, and write ``jarvis.json`` into the run's folder.

    Args:
        path: folder of a finished run; the last stage that used JARVIS is looked at.
        remote: dataset with held-out pictures; None: the run's evaluation data.
        training: dataset that the guesses are fitted on; None: that of the stage.
        fit: pictures to fit guesses on.
        limit: held-out pictures.
        console: for the table.

    Raises:
        UserError: no stage used JARVIS with masks, or there is no data to look at.
    """
    for name, value in (("--fit", fit), ("--limit", limit)):
        if value < 2:
            raise UserError(f"{name} {value}: use 2 or more")
    run = open_method(path, JARVIS)
    if run.method.masks is None:
        raise UserError(f"{path}: stage {run.stage.name} was trained with masks: none, nothing was hidden")
    evaluation = run.loaded.run.evaluation
    if remote is None and evaluation is None:
        raise UserError(f"{path}: the run names no evaluation data; give --remote FOLDER")
    held_out = (
        evaluation.dataset if remote is None and evaluation is not None else DatasetConfig(remote=remote)
    )
    learnt = run.stage.config.train_loader.dataset if training is None else DatasetConfig(remote=training)
    shown = [_samples(run, source, count) for source, count in ((learnt, fit), (held_out, limit))]
    found = measure(run.model, run.method, _Batches(run, shown[0]), _Batches(run, shown[1]))
    _print(console, run.loaded.run.run_name, found)
    record = {
        "run": run.loaded.run.run_name, "stage": run.stage.name, "layer": run.method.tap,
        "masks": asdict(run.method.masks), "target": run.method.built_target.identity, "data": held_out.remote, **found.as_dict(),
    }  # fmt: skip
    write_atomically(run.folder.path / "jarvis.json", json.dumps(record, indent=1))
    return found


def _samples(run: OpenedMethod[JARVIS], source: DatasetConfig, count: int) -> list[dict[str, Any]]:
    source = replace(source, shuffle=False, patch_targets="ignore")
    samples = with_dataset(
        source, run.loaded.run.seed, lambda data: list(islice(distinct_pictures(data), count))
    )
    if len(samples) < 2:
        raise UserError(f"{source.remote}: needs two different pictures or more")
    return samples


class _Batches:
    """Device batches of some samples, as often as they are asked for; none of a single sample."""

    def __init__(self, run: OpenedMethod[JARVIS], samples: list[dict[str, Any]]):
        self.collator, self.samples = run.collator, samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        starts = list(range(0, len(self.samples), BATCH))
        if len(self.samples) - starts[-1] == 1 and len(starts) > 1:
            starts.pop()  # a single picture has no other one: it joins those before
        for start, end in zip(starts, [*starts[1:], len(self.samples)], strict=True):
            yield self.collator(self.samples[start:end])


def _print(console: Console, name: str, found: HiddenFeatures) -> None:
    count = len(found.cosine["jarvis"])
    table = Table(
        title=f"{name}: {found.positions} hidden patches of {count} held-out pictures, guesses fitted on {found.fitted_on}",
        title_justify="left",
    )
    table.add_column("guess")
    table.add_column("centred cosine", justify="right")
    table.add_column("within the picture", justify="right")
    for row, of_row in found.summary().items():
        table.add_row(SAID[row], *(f"{mean:.3f} +-{half:.3f}" for mean, half in of_row.values()))
    console.print(table)
    console.print(
        "centred: without the training pictures' mean at each place; within the picture: without its own mean over "
        "hidden patches, too; +- 95 % over pictures",
        soft_wrap=True,
    )
