"""What a study asks of its parts and of its controls before any cell is trained, and what it assumes about its noise."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...models.errors import UserError, nearest

ATTRIBUTES = ("colour", "shape", "size", "position")
"""What a linear probe can read of an object; position is the third of the picture that it stands in: left, middle, right."""

LEAST_SCENES = 40
"""A quarter of them is scored: fewer say nothing."""


@dataclass
class TargetCheck:
    """A method's target, as the run of a cell builds it: the least accuracy of a linear probe for each attribute asked.

    ``of``: the method. ``cell``: whose; default: the cell that is named like the method.
    """

    of: str = ""
    cell: str | None = None
    colour: float | None = None
    shape: float | None = None
    size: float | None = None
    position: float | None = None


@dataclass
class TowerCheck:
    """A cell's vision tower before training, as its projector reads it: least accuracies, as for a target.

    ``position_gap``: so much less of an object's position is read from it than from the target of ``teacher``.
    """

    cell: str = "baseline"
    colour: float | None = None
    shape: float | None = None
    size: float | None = None
    position_gap: float | None = None


@dataclass
class BlindCheck:
    """A cell that was trained without looking, on a suite of questions with habitual answers.

    ``aligned``: least accuracy where habit is right: it can be learnt. ``conflict``: greatest accuracy where habit is wrong: there is
    nothing else to go by.
    """

    cell: str = ""
    suite: str = "conflict"
    aligned: float | None = None
    conflict: float | None = None


@dataclass
class PositiveCheck:
    """A cell that must beat its baseline by the primary endpoint, the interval wholly on the better side of 0."""

    cell: str = ""


@dataclass
class CheckConfig:
    """``check:`` of a study; a line that is not given is not asked. ``scenes``: made for the probes, a quarter is scored."""

    scenes: int = 1000
    target: TargetCheck | None = None
    teacher: TargetCheck | None = None
    tower: TowerCheck | None = None
    blind: BlindCheck | None = None
    positive: PositiveCheck | None = None


@dataclass
class PowerConfig:
    """``power:`` of a study: what is assumed about the primary endpoint's paired difference, for the plan.

    ``seed_sd``: standard deviation, over seeds, of the true difference. ``disagreement``: share of pictures (pairs) about which a
    cell and the baseline differ, right against wrong, under one seed.
    """

    seed_sd: float | None = None
    disagreement: float | None = None


def asked_of(check: TargetCheck | TowerCheck) -> dict[str, float]:
    """Attribute -> least accuracy, of what a line asks a probe."""
    found = {name: getattr(check, name, None) for name in ATTRIBUTES}
    return {name: least for name, least in found.items() if least is not None}


def targets_of(check: CheckConfig) -> dict[str, TargetCheck]:
    """The targets that are asked about, by their key, each with its cell."""
    return {key: one for key in ("target", "teacher") if (one := getattr(check, key)) is not None}


def cell_of(check: TargetCheck) -> str:
    """The cell whose target is meant."""
    return check.cell if check.cell is not None else check.of


def refuse_check(check: CheckConfig, cells: Collection[str], fixed: bool) -> None:
    """Refuse what no study could be asked.

    Args:
        check: as written.
        cells: names of the study's cells.
        fixed: whether the study names its primary endpoint.

    Raises:
        UserError: in one line.
    """
    if check.scenes < LEAST_SCENES:
        raise UserError(f"study: check.scenes: {check.scenes}: use {LEAST_SCENES} or more")
    for key, target in targets_of(check).items():
        if not target.of:
            raise UserError(f"study: check.{key}.of: needs the method whose target is meant")
        if target.cell is None and target.of not in cells:
            raise UserError(
                f"study: check.{key}.cell: no cell is named '{target.of}'; say which cell's target is meant"
            )
        _known(f"{key}.cell", cell_of(target), cells)
        if not asked_of(target):
            raise UserError(f"study: check.{key}: asks nothing; give {', '.join(ATTRIBUTES)}")
        _shares(key, asked_of(target))
    if check.tower is not None:
        _known("tower.cell", check.tower.cell, cells)
        gap = check.tower.position_gap
        if not asked_of(check.tower) and gap is None:
            raise UserError("study: check.tower: asks nothing; give colour, shape, size or position_gap")
        if gap is not None and check.teacher is None:
            raise UserError(
                "study: check.tower.position_gap: needs check.teacher, below which position is to be read"
            )
        _shares("tower", {**asked_of(check.tower), "position_gap": gap})
    if check.blind is not None:
        _known("blind.cell", check.blind.cell, cells)
        if check.blind.aligned is None and check.blind.conflict is None:
            raise UserError("study: check.blind: asks nothing; give aligned or conflict")
        _shares("blind", {"aligned": check.blind.aligned, "conflict": check.blind.conflict})
    if check.positive is not None:
        _known("positive.cell", check.positive.cell, cells)
        if not fixed:
            raise UserError("study: check.positive: needs primary: the endpoint by which it is better")
    if not (targets_of(check) or check.tower or check.blind or check.positive):
        raise UserError("study: check: asks nothing; give target, teacher, tower, blind or positive")


def refuse_power(power: PowerConfig, fixed: bool) -> None:
    """Refuse assumptions that cannot be; ``fixed``: whether the study names its primary endpoint, which they are about.

    Raises:
        UserError: in one line.
    """
    if not fixed:
        raise UserError("study: power: needs primary: the endpoint that it is about")
    for key in ("seed_sd", "disagreement"):
        value = getattr(power, key)
        if value is None:
            raise UserError(f"study: power.{key}: needs a value; both are assumed, or none")
    if power.seed_sd is not None and power.seed_sd < 0:
        raise UserError(f"study: power.seed_sd: {power.seed_sd:g}: use 0 or more")
    _shares("power", {"disagreement": power.disagreement}, section="")


def _known(key: str, cell: str, cells: Collection[str]) -> None:
    if not cell:
        raise UserError(f"study: check.{key}: needs the name of a cell")
    if cell not in cells:
        raise UserError(f"study: check.{key}: no cell '{cell}'{nearest(cell, cells)}")


def _shares(key: str, asked: Mapping[str, float | None], section: str = "check.") -> None:
    for name, value in asked.items():
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"study: {section}{key}.{name}: {value:g}: use a share from 0 to 1")
