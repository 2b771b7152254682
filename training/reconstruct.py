"""``opsin reconstruct``: what a finished run's ROSS head reads off the language model, in numbers and in pictures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..algorithms.ross.diffusion import ignoring_the_condition
from ..algorithms.ross.ross import ROSS
from ..algorithms.ross.sampling import conditions, reconstruct, targets_shown
from ..algorithms.ross.targets import Target
from ..algorithms.strip import strip
from ..data.batch import split_batch, to_device
from ..evaluation.condition_gain import (
    CONDITIONS,
    ConditionCurve,
    condition_curve,
    others,
)
from ..evaluation.intervals import mean_and_half
from ..models.errors import UserError
from .opened import OpenedMethod, distinct_pictures, open_method
from .run_folder import write_atomically
from .schema import DatasetConfig
from .scoring import with_dataset

BATCH = 32
"""Pictures looked at together; each one's other picture is the next of the same batch."""

SAMPLED = 32
"""Pictures that are reconstructed for the PSNR, or as many as there are."""


def reconstruct_run(
    path: Path,
    remote: str | None,
    *,
    against: Path | None = None,
    limit: int = 256,
    times: int = 10,
    pictures: int = 6,
    steps: int = 50,
    console: Console,
) -> ConditionCurve | None:
    """Measure the condition curve, print it, and write ``ross.json`` and ``ross.png`` into the run's folder.

    Args:
        path: folder of a finished run.
        remote: dataset with held-out pictures; None: the run's evaluation data.
        against: another run (a control, such as ``detach: true``) that is measured on the same pictures and noise.
        limit: pictures to measure on.
        times: at how many times, evenly spread.
        pictures: rows of the strip; 0: no strip.
        steps: evaluations of the denoiser a reconstruction.
        console: for the tables.

    Returns:
        the run's curve; None for ``decoded_mse``.

    Raises:
        UserError: a run has no ROSS in its last stage, or there is no data to look at.
    """
    least = {"--limit": (limit, 2), "--times": (times, 1), "--pictures": (pictures, 0), "--steps": (steps, 1)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise UserError(f"{name} {value}: use {smallest} or more")
    one = _open(path)
    evaluation = one.loaded.run.evaluation
    if remote is None and evaluation is None:
        raise UserError(f"{path}: the run names no evaluation data; give --remote FOLDER")
    source = evaluation.dataset if remote is None and evaluation is not None else DatasetConfig(remote=remote)
    # Stored targets belong to another model's patches, perhaps; here the pictures themselves are measured.
    source = replace(source, shuffle=False, patch_targets="ignore")
    samples = with_dataset(
        source, one.loaded.run.seed, lambda data: list(islice(distinct_pictures(data), limit))
    )
    if len(samples) < 2:
        raise UserError(f"{source.remote}: needs two different pictures or more")
    record: dict[str, Any] = {
        "run": one.loaded.run.run_name,
        "stage": one.stage.name,
        "data": source.remote,
    }
    curve = None
    if one.method.objective.decoded:
        console.print("objective decoded_mse: no curve, it has no latents to compare; see the strip")
    else:
        curve = _measure(one, samples, times)
        _print(console, one.loaded.run.run_name, curve)
        record.update(curve.as_dict())
    if against is not None and curve is not None:
        other = _open(against)
        _refuse_other_kind(one, other)
        second = _measure(other, samples, times)
        if len(second.gains()) != len(curve.gains()):
            raise UserError(f"--against {against}: its model cuts these pictures into other views")
        _print(console, other.loaded.run.run_name, second)
        difference, half = mean_and_half(curve.gains() - second.gains())
        console.print(
            f"difference of the condition gains: {difference:.4f} +- {half:.4f} (95 %, paired by view)"
        )
        record["against"] = {"run": other.loaded.run.run_name, **second.as_dict()}
        record["difference"], record["difference_95"] = difference, half
    if pictures and type(one.method.built_target).decode is not Target.decode:
        sampled = sample(one, samples[: max(2, pictures, SAMPLED)], steps)
        record["psnr_dB"] = sampled.psnr()
        said = ", ".join(f"{name} {value:.1f}" for name, value in record["psnr_dB"].items())
        console.print(f"PSNR of {len(sampled.columns['right'])} sampled views, dB: {said}", soft_wrap=True)
        strip({t: c[:pictures] for t, c in sampled.columns.items()}).save(one.folder.path / "ross.png")
        console.print(f"strip: {one.folder.path / 'ross.png'}", soft_wrap=True)
    write_atomically(one.folder.path / "ross.json", json.dumps(record, indent=1))
    return curve


def _refuse_other_kind(one: OpenedMethod[ROSS], other: OpenedMethod[ROSS]) -> None:
    """Losses of another objective, target or schedule are other quantities."""
    for what in (
        lambda ross: ("objective", ross.objective.name),
        lambda ross: ("target", ross.built_target.identity),
        lambda ross: ("timesteps", ross.timesteps),
    ):
        (key, ours), (_, theirs) = what(one.method), what(other.method)
        if ours != theirs:
            raise UserError(
                f"--against {other.folder.path}: its ross.{key} is '{theirs}', this run's is '{ours}': nothing to compare"
            )


def _open(path: Path) -> OpenedMethod[ROSS]:
    return open_method(path, ROSS, last=True)


def _measure(run: OpenedMethod[ROSS], samples: list[dict[str, Any]], times: int) -> ConditionCurve:
    if run.method.objective.noisy and times > run.method.timesteps:
        raise UserError(f"--times {times}: the schedule has {run.method.timesteps}")
    grid = [int((i + 0.5) * run.method.timesteps / times) for i in range(times)]
    # A last batch of one picture would have no other picture: it joins the one before.
    starts = list(range(0, len(samples), BATCH))
    if len(samples) - starts[-1] == 1 and len(starts) > 1:
        starts.pop()
    ends = [*starts[1:], len(samples)]
    batches = (_batch(run, samples[a:b]) for a, b in zip(starts, ends, strict=True))
    return condition_curve(run.model, run.method, batches, grid)


@dataclass
class Sampled:
    """Reconstructions of some views: title -> a picture (3, h, w) in [0, 1] of each."""

    columns: dict[str, list[torch.Tensor]]

    def psnr(self) -> dict[str, float]:
        """Mean over views of the peak signal-to-noise ratio against the picture, in dB; of ``the mean picture``, too:
        what one picture for all of them gets (of views with the commonest size)."""
        pictures = self.columns["picture"]
        found = {
            title: float(np.mean([_psnr(a, b) for a, b in zip(column, pictures, strict=True)]))
            for title, column in self.columns.items()
            if title != "picture"
        }
        sizes = [tuple(p.shape) for p in pictures]
        alike = [
            p for p, size in zip(pictures, sizes, strict=True) if size == max(set(sizes), key=sizes.count)
        ]
        mean = torch.stack(alike).mean(0)
        return {**found, "the mean picture": float(np.mean([_psnr(mean, p) for p in alike]))}


def sample(run: OpenedMethod[ROSS], samples: list[dict[str, Any]], steps: int) -> Sampled:
    """Views of some samples as the target reads them, what the target keeps, and what is sampled under each condition."""
    batch = _batch(run, samples)
    model, ross = run.model, run.method
    right = conditions(model, ross, batch)
    source, used = others(batch["grids"])
    shown = {"right": right, "another's": right[source.to(right.device)], "zero": torch.zeros_like(right)}
    pictures = zip(model.pictures(batch), batch["grids"], strict=True)
    columns = {"picture": [ross.built_target.sized(p[None], *grid)[0] for p, grid in pictures]}
    columns["target"] = targets_shown(model, ross, batch)
    columns.update({name: reconstruct(model, ross, batch, c, steps) for name, c in shown.items()})
    return Sampled({t: [p for p, u in zip(c, used, strict=True) if u] for t, c in columns.items()})


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * math.log10(max(float((a - b).square().mean()), 1e-12))


def _batch(run: OpenedMethod[ROSS], samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = split_batch(run.collator(samples), None, training=False)[0]
    return to_device(batch, next(run.model.net.hf.parameters()).device)


def _print(console: Console, name: str, curve: ConditionCurve) -> None:
    views = len(curve.loss["right"])
    table = Table(title=f"{name}: reconstruction loss on {views} held-out views", title_justify="left")
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
