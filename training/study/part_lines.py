"""Lines of a check that need no training: what a linear probe reads of targets and of a tower, before any run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from ...algorithms.predicts import PredictsTarget
from ...evaluation.linear_probe import Reading
from ...evaluation.probe_features import OBJECT, TOWER
from ...evaluation.probes import probe_scenes, probes
from ...models.errors import UserError, nearest
from ...models.targets import Target
from ..builders import algorithms_of_stage
from ..registry import METHODS
from ..registry import algorithms as registry
from ..run_folder import RunFolder
from ..stage_data import build_collator
from ..stage_run import build_model
from ..stages import resolve
from .check_config import CheckConfig, asked_of, cell_of, targets_of
from .lines import Line, at_least
from .runs import Run
from .work import Work

POSITION, GAP = "position", "position_gap"
BATCH = 32
"""Pictures a forward pass."""

Readings = dict[tuple[str, str], Reading]
"""(``target``, ``teacher`` or ``tower``; attribute) -> what the probe read."""


def method_of(run: Run, key: str, name: str) -> PredictsTarget:
    """A method as a run would build it, of the first stage that uses it; its target is not built yet.

    Args:
        run: of the cell.
        key: ``target`` or ``teacher``, for messages.
        name: of the method.

    Raises:
        UserError: there is no such method, it has no target, or the cell is trained without it.
    """
    if name not in registry.names():
        raise UserError(f"study: check.{key}.of: '{name}': unknown method{nearest(name, METHODS)}")
    loaded = run.load()
    for stage in resolve(loaded):
        method = algorithms_of_stage(loaded, stage.name, stage.config).get(name)
        if method is None or method.is_off():
            continue
        if not isinstance(method, PredictsTarget):
            raise UserError(f"study: check.{key}.of: {name} predicts no target")
        return method
    raise UserError(f"study: check.{key}.cell: cell {run.cell.name} is trained without {name}")


def part_lines(work: Work, check: CheckConfig) -> list[Line]:
    """Fit all probes that are asked for; models, targets and pictures are those of the named cells' runs."""
    asked: dict[str, dict[str, set[str]]] = {}  # cell -> part -> attributes
    for key, one in targets_of(check).items():
        asked.setdefault(cell_of(one), {}).setdefault(key, set()).update(asked_of(one))
    tower = check.tower
    if tower is not None:
        asked.setdefault(tower.cell, {}).setdefault(TOWER, set()).update(asked_of(tower))
        if tower.position_gap is not None:
            assert check.teacher is not None
            asked[tower.cell][TOWER].add(POSITION)
            asked[cell_of(check.teacher)]["teacher"].add(POSITION)
    found: Readings = {}
    for cell, parts in asked.items():
        found.update(_read(work.run_of(cell), check, parts))
    lines = []
    for key, one in targets_of(check).items():
        what = f"{{}} from {one.of}'s target ({cell_of(one)})"
        lines += [
            _line(f"{key}.{a}", what.format(a), found, key, a, least) for a, least in asked_of(one).items()
        ]
    if tower is not None:
        what = f"{{}} from the vision tower ({tower.cell})"
        lines += [
            _line(f"{TOWER}.{a}", what.format(a), found, TOWER, a, least)
            for a, least in asked_of(tower).items()
        ]
        if tower.position_gap is not None:
            lines.append(_gap(found, tower.position_gap))
    return lines


def _read(run: Run, check: CheckConfig, parts: Mapping[str, set[str]]) -> Readings:
    """What probes read of the parts of one cell."""
    loaded = run.load()
    stages = resolve(loaded)
    folder = RunFolder(loaded.run.run_root, loaded.run.run_name)
    model = build_model(loaded, stages[0], folder, [s.name for s in stages])
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    targets: dict[str, Target] = {}
    for key, one in targets_of(check).items():
        if key in parts:
            method = method_of(run, key, one.of)
            method.prepare(model, loaded.run.seed)
            targets[key] = method.built_target
    collator = build_collator(model, stages[-1], stages[-1].config.train_loader)
    wanted = [
        (OBJECT, attribute, part) for part, attributes in parts.items() for attribute in sorted(attributes)
    ]
    read = probes(
        model,
        collator,
        probe_scenes(model, check.scenes),
        layers=[],
        batch_size=BATCH,
        targets=targets,
        only=wanted,
    )
    return {(one.site, one.attribute): one.reading for one in read.read_outs}


def _line(key: str, what: str, found: Readings, part: str, attribute: str, least: float) -> Line:
    reading = found.get((part, attribute))
    if reading is None:
        return Line(key, what, f"at least {least:g}", at_least(None, least), why="too few objects to tell")
    value = reading.accuracy
    return Line(
        key, what, f"at least {least:g}", at_least(value.value, least), value.value, value.n, value.standard_error,
        beside={"shuffled labels": reading.shuffled, "most frequent": reading.majority},
    )  # fmt: skip


def _gap(found: Readings, least: float) -> Line:
    what = "position from the tower, below that from the teacher's target"
    head = (f"{TOWER}.{GAP}", what, f"at least {least:g} below")
    above, below = found.get(("teacher", POSITION)), found.get((TOWER, POSITION))
    if above is None or below is None or above.accuracy.value is None or below.accuracy.value is None:
        return Line(*head, at_least(None, least), why="too few objects to tell")
    value = above.accuracy.value - below.accuracy.value
    errors = [one.accuracy.standard_error or 0.0 for one in (above, below)]
    return Line(
        *head, at_least(value, least), value, below.accuracy.n, math.hypot(*errors),
        beside={"teacher": above.accuracy.value, "tower": below.accuracy.value, "most frequent": below.majority},
    )  # fmt: skip
