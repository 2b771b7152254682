"""What a study is: a base, what is added to it in each cell, the seeds, and what was to be measured before it began."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...models.errors import UserError, nearest
from ..config import checked, merged
from ..provenance import Provenance
from ..run_folder import refuse_name
from .check_config import CheckConfig, PowerConfig, refuse_check, refuse_power
from .parts import check_parts, variables

ROLES = ("baseline", "factorial", "single", "control", "placebo", "positive")
SUBSETS = ("singles", "pairs", "all")
BASELINE = "baseline"


@dataclass
class EndpointConfig:
    """One number of one suite: ``suite`` as the evaluation names it, ``measure`` as its scorer does."""

    suite: str = ""
    measure: str = ""


@dataclass
class CellConfig:
    """One way to train.

    ``methods``: those that are switched on (the base's own keywords are kept; all others of the study are off).
    ``files``: YAMLs merged over the base. ``set``: ``key=value`` after them. ``role``: see :data:`ROLES`.
    ``evaluation``: YAMLs and ``key=value`` of ``opsin eval`` after the study's (``fusion.strength=0.35``). ``placebo_of``: the cell whose effect this one must not have. ``matched_to``: the cell that it is held against, in place of
    the baseline. ``seeds``: fewer than the study's, from the first. ``tries``: settings tried on development seeds
    (None: those of its method, :class:`StudyConfig`).
    """

    methods: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    set: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)
    role: str = "single"
    placebo_of: str | None = None
    matched_to: str | None = None
    seeds: int | None = None
    tries: int | None = None


@dataclass
class StudyConfig:
    """A study's YAML.

    ``base``: YAMLs of ``opsin train``, merged left to right; ``set``: ``key=value`` after them. ``factorial``: methods of which
    every subset is a cell; ``factorial_seeds``: how many seeds these have, from the first (None: all). ``along``: method -> YAMLs
    and ``key=value`` that go along with it wherever it is on. ``tries``: method -> settings tried on development seeds before those
    of its cells were taken, placebos among them (of a cell with more methods: the most; without: one). ``cells``: further ones by name. ``evaluation``: YAMLs and
    ``key=value`` of ``opsin eval``. ``primary``: the endpoint that was fixed before the first run. ``secondary``: others, for which intervals are widened (Holm). ``parts``: what all runs
    share, trained before them (``part_kinds``); ``${variables.NAME}`` is the folder of part NAME. ``check``: what must hold before
    any cell is trained. ``power``: what is assumed about noise, for the plan.
    """

    name: str = "study"
    question: str = ""
    base: list[str] = field(default_factory=list)
    set: list[str] = field(default_factory=list)
    factorial: list[str] = field(default_factory=list)
    factorial_seeds: int | None = None
    along: dict[str, list[str]] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    cells: dict[str, CellConfig] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [17, 18, 19])
    evaluation: list[str] = field(default_factory=list)
    primary: EndpointConfig | None = None
    secondary: list[EndpointConfig] = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)
    check: CheckConfig | None = None
    power: PowerConfig | None = None


@dataclass(frozen=True)
class Cell:
    """One cell of the grid, without its seed: what ``opsin train`` is called with.

    Attributes:
        name: of the cell.
        methods: switched on, in the order of their names.
        files: YAMLs.
        arguments: ``key=value``, toggles of all methods of the study among them.
        role, placebo_of, matched_to: see :class:`CellConfig`.
        tries: settings that were tried before these were taken; at least 1.
        seeds: of its runs.
        evaluation: YAMLs and ``key=value`` of ``opsin eval``, those of the study first.
    """

    name: str
    methods: tuple[str, ...]
    files: tuple[str, ...]
    arguments: tuple[str, ...]
    role: str
    seeds: tuple[int, ...]
    placebo_of: str | None = None
    matched_to: str | None = None
    tries: int = 1
    evaluation: tuple[str, ...] = ()


def load_study(files: Sequence[str], arguments: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML.

    Raises:
        UserError: an unknown key, a wrong type, or a reference to a cell that is not there.
    """
    provenance = Provenance()
    config = checked(StudyConfig, merged(files, arguments, provenance), provenance)
    grid(config)  # says what does not fit together
    return config


def of_toggles(
    base: Sequence[str],
    arguments: Sequence[str],
    toggles: Sequence[str],
    *,
    subsets: str,
    seeds: Sequence[int],
    overlays: Mapping[str, Sequence[str]],
    evaluation: Sequence[str],
    primary: EndpointConfig | None = None,
    name: str = "ablation",
) -> StudyConfig:
    """The study that ``opsin ablate`` asks for.

    Args:
        base: YAMLs of the run.
        arguments: ``key=value``.
        toggles: methods.
        subsets: ``singles``: each alone; ``pairs``: and each two; ``all``: every subset.
        seeds: of the runs.
        overlays: further cells: name -> YAMLs merged over the base.
        evaluation: YAMLs and ``key=value`` of ``opsin eval``.
        primary: the endpoint; None: the first suite's first measure.
        name: of the study.
    """
    if subsets not in SUBSETS:
        raise UserError(f"--subsets '{subsets}': unknown{nearest(subsets, SUBSETS)}")
    if len(set(toggles)) < len(toggles):
        raise UserError(f"--toggle: a method is named twice in {' '.join(toggles)}")
    most = {"singles": 1, "pairs": 2, "all": len(toggles)}[subsets]
    chosen = [c for size in range(1, most + 1) for c in itertools.combinations(sorted(toggles), size)]
    cells = {"+".join(c): CellConfig(methods=list(c)) for c in chosen}
    for label, files in overlays.items():
        cells[label] = CellConfig(files=list(files), role="control")
    complete = list(toggles) if subsets == "all" else []
    config = StudyConfig(
        name=name,
        base=list(base),
        set=list(arguments),
        factorial=sorted(complete),
        cells={} if complete and not overlays else cells,
        seeds=list(seeds),
        evaluation=list(evaluation),
        primary=primary,
    )
    if complete:
        config = replace(config, cells={k: v for k, v in cells.items() if not v.methods})
    grid(config)
    return config


def grid(config: StudyConfig) -> list[Cell]:
    """All cells, the baseline first.

    Raises:
        UserError: an empty study, a name twice, or a reference to a cell that is not there.
    """
    check_parts(config.parts)
    if not config.base:
        raise UserError("study: base: needs at least one YAML of a run")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"study: seeds: {config.seeds}: needs at least one, each once")
    given: dict[str, CellConfig] = {BASELINE: CellConfig(role="baseline")}
    for size in range(1, len(config.factorial) + 1):
        for chosen in itertools.combinations(sorted(config.factorial), size):
            given["+".join(chosen)] = CellConfig(
                methods=list(chosen), role="factorial", seeds=config.factorial_seeds
            )
    for name, cell in config.cells.items():
        if name in given and name != BASELINE:
            raise UserError(f"study: cells.{name}: is a cell of the factorial already")
        given[name] = replace(cell, role="baseline") if name == BASELINE else cell
    if len(given) < 2:
        raise UserError("study: nothing is held against the baseline; give factorial: or cells:")
    if config.check is not None:
        refuse_check(config.check, given, config.primary is not None)
    if config.power is not None:
        refuse_power(config.power, config.primary is not None)
    if config.factorial_seeds is not None and not config.factorial:
        raise UserError("study: factorial_seeds: there is no factorial")
    toggles = sorted({m for cell in given.values() for m in cell.methods})
    for key in ("along", "tries"):
        for method in getattr(config, key):
            if method not in toggles:
                raise UserError(f"study: {key}.{method}: no cell has it{nearest(method, toggles)}")
    for key, tries in {
        **{f"tries.{method}": tries for method, tries in config.tries.items()},
        **{f"cells.{name}.tries": cell.tries for name, cell in given.items()},
    }.items():
        if tries is not None and tries < 1:
            raise UserError(f"study: {key}: {tries}: what was taken was tried, so 1 or more")
    cells = [_cell(config, name, cell, given, toggles) for name, cell in given.items()]
    _refuse_unmatched(cells)
    return cells


def _refuse_unmatched(cells: Sequence[Cell]) -> None:
    """A run is held against the one of its own seed, so that one has to be there."""
    seeds = {cell.name: cell.seeds for cell in cells}
    for cell in cells:
        against = cell.matched_to or BASELINE
        if len(cell.seeds) > len(seeds[against]):
            key = "factorial_seeds" if cell.role == "factorial" else f"cells.{cell.name}.seeds"
            raise UserError(
                f"study: {key}: {len(cell.seeds)}, but {against}, against which it is held, has "
                f"{len(seeds[against])}; give both as many"
            )


def _cell(
    config: StudyConfig, name: str, cell: CellConfig, given: Mapping[str, CellConfig], toggles: Sequence[str]
) -> Cell:
    refuse_name(name, "study: cells")
    if cell.role not in ROLES:
        raise UserError(f"study: cells.{name}.role: '{cell.role}': unknown{nearest(cell.role, ROLES)}")
    for key in ("placebo_of", "matched_to"):
        other = getattr(cell, key)
        if other is not None and (other not in given or other == name):
            raise UserError(f"study: cells.{name}.{key}: no other cell '{other}'{nearest(other, given)}")
    if cell.seeds is not None and not 1 <= cell.seeds <= len(config.seeds):
        key = "factorial_seeds" if cell.role == "factorial" else f"cells.{name}.seeds"
        raise UserError(f"study: {key}: {cell.seeds}: the study has {len(config.seeds)}")
    tries = cell.tries
    if tries is None:
        tries = max((config.tries.get(method, 1) for method in cell.methods), default=1)
    along = [given for method in sorted(cell.methods) for given in config.along.get(method, ())]
    on = [f"algorithms.{m}={'true' if m in cell.methods else 'false'}" for m in toggles]
    return Cell(
        name=name,
        methods=tuple(sorted(cell.methods)),
        files=(*config.base, *(g for g in along if "=" not in g), *cell.files),
        arguments=(*variables(config.parts), *config.set, *on, *(g for g in along if "=" in g), *cell.set),
        role=cell.role,
        seeds=tuple(config.seeds[: cell.seeds]),
        placebo_of=cell.placebo_of,
        matched_to=cell.matched_to,
        tries=tries,
        evaluation=(*config.evaluation, *cell.evaluation),
    )
