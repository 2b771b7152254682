"""The YAML of ``opsin eval MODEL CONFIG``: which suites are asked and which analyses are made, every key checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..evaluation.analyses import Analysis
from ..evaluation.suites import Suite
from ..models.errors import UserError
from .builders import check_arguments, construct
from .config import checked, merged
from .provenance import Provenance
from .registry import Registry, analyses, evaluations
from .schema import Spec

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Names of suites and analyses are parts of file names and of metrics' names."""


@dataclass
class SuitesConfig:
    """What is measured of a model.

    ``suites``: name -> ``suite`` (registered; default: the name) and its keywords. ``analyses``: name -> ``analysis``
    (default: the name), ``data`` (a suite whose questions it looks at) and its keywords. ``limit``: questions of each suite.
    ``blind``: also with another question's picture, the row that tells what looking is worth,
    and ``blind_limit`` how many of each suite's first questions that is. ``fusion``: under ability
    fusion. ``chat_template``, ``system_prompt``: where the model's own are not to be used. ``baseline``: a ``scores.json``
    that the report holds these scores against. ``wall``: pictures in the report. ``lmms``: tasks of lmms-eval.
    """

    suites: dict[str, Spec] = field(default_factory=dict)
    analyses: dict[str, Spec] = field(default_factory=dict)
    batch_size: int = 16
    limit: int | None = None
    blind: bool = True
    blind_limit: int | None = None
    fusion: Spec | None = None
    chat_template: str | None = None
    system_prompt: str | None = None
    device: str | None = None
    precision: str = "fp32"
    baseline: str | None = None
    wall: int = 200
    lmms: Spec | None = None
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass
class Wanted:
    """A checked configuration, built: nothing was read yet but the YAML.

    Attributes:
        config: as written.
        suites: name -> suite.
        registered: name -> under which name it is registered.
        analyses: name -> analysis.
        provenance: where each key was written.
    """

    config: SuitesConfig
    suites: dict[str, Suite]
    registered: dict[str, str]
    analyses: dict[str, Analysis]
    provenance: Provenance

    def where(self, *path: str) -> str:
        """``file:line: key.path`` of a key, for messages."""
        return f"{self.provenance.where(path)}: {'.'.join(path)}"


def suites_of(given: Sequence[str]) -> Wanted:
    """:func:`load_suites` of YAMLs and ``key=value`` in one list, as a study's ``evaluation:`` has them."""
    return load_suites(*split_given(given))


def split_given(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """YAMLs and ``key=value`` in one list -> the YAMLs, the others."""
    return [g for g in given if "=" not in g], [g for g in given if "=" in g]


def load_suites(files: Sequence[str], arguments: Sequence[str] = ()) -> Wanted:
    """Read the YAML of an evaluation; see ``config.merged``.

    Raises:
        UserError: whatever cannot be meant, in one line.
    """
    provenance = Provenance()
    config = checked(SuitesConfig, merged(files, arguments, provenance), provenance)
    wanted = Wanted(config, {}, {}, {}, provenance)
    for key, least in (("batch_size", 1), ("limit", 1), ("blind_limit", 1), ("wall", 0)):
        value = getattr(config, key)
        if value is not None and value < least:
            raise UserError(f"{wanted.where(key)}: {value}: use {least} or more")
    if config.precision not in ("fp32", "amp_bf16", "amp_fp16"):
        raise UserError(f"{wanted.where('precision')}: '{config.precision}': use fp32, amp_bf16 or amp_fp16")
    if config.device not in (None, "cpu", "gpu"):
        raise UserError(f"{wanted.where('device')}: '{config.device}': use cpu or gpu")
    if config.device == "gpu" and not torch.cuda.is_available():
        raise UserError(f"{wanted.where('device')}: 'gpu': none is available here; use cpu")
    if not (config.suites or config.analyses or config.lmms):
        raise UserError("configuration: nothing is asked; give suites: or analyses:")
    if config.lmms is not None:
        from ..evaluation.lmms.run import check_run, run_lmms

        where = partial(_place, partial(wanted.where, "lmms"))
        check_arguments(run_lmms, config.lmms, where, {"model": "", "out": ""})
        try:
            check_run(**config.lmms)
        except UserError as error:
            raise UserError(f"{where('')}: {error}") from error
    for name, spec in config.suites.items():
        wanted.registered[name] = str(spec.get("suite", name))
        wanted.suites[name] = suite_of(name, spec, wanted.where, "suites")
    for name, spec in config.analyses.items():
        wanted.analyses[name] = analysis_of(name, spec, wanted.where, "analyses")
    return wanted


def suite_of(name: str, spec: Mapping[str, Any], place: Any, *section: str) -> Suite:
    """Build one suite from its keys; its files are not read yet.

    Args:
        name: of the suite.
        spec: ``suite`` and keywords of what is registered there.
        place: key path -> its place, for messages.
        section: of the configuration that it stands in.
    """
    built = _built(evaluations, "suite", name, spec, partial(place, *section, name))
    if not isinstance(built, Suite):
        raise UserError(f"{place(*section, name)}: '{spec.get('suite', name)}' is no suite of questions")
    return built


def analysis_of(name: str, spec: Mapping[str, Any], place: Any, *section: str) -> Analysis:
    """Build one analysis with the suite that it looks at; nothing is read yet."""
    where = partial(place, *section, name)
    data = spec.get("data")
    keywords = {k: v for k, v in spec.items() if k != "data"}
    make = analyses.get(str(spec.get("analysis", name)), where())
    given: dict[str, Any] = {}
    if data is not None:
        if not isinstance(data, Mapping) or "suite" not in data:
            raise UserError(f"{where('data')}: give the questions it looks at, such as {{suite: scenes}}")
        given["data"] = suite_of("data", data, partial(place, *section), name)
    built = _built(analyses, "analysis", name, keywords, where, **given)
    if not isinstance(built, Analysis):
        raise UserError(f"{where()}: {make!r} is no analysis")
    return built


def _built(
    registry: Registry, word: str, name: str, spec: Mapping[str, Any], where: Any, **given: Any
) -> Any:
    if not NAME.fullmatch(name):
        raise UserError(f"{where()}: '{name}': use letters, digits, '_', '-' and '.'")
    registered = spec.get(word, name)
    make = registry.get(str(registered), where(*([word] if word in spec else [])))
    keywords = {k: v for k, v in spec.items() if k != word}
    try:
        return construct(make, keywords, partial(_place, where), **given)
    except UserError as error:  # what a constructor itself refuses names a keyword, not its place
        if f"{name}" in str(error).partition(": ")[2]:
            raise
        raise UserError(f"{where()}: {error}") from error


def _place(where: Any, key: str) -> str:
    return where(*([key] if key else []))
