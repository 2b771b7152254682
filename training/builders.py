"""Specs of a configuration -> objects, checked against the constructors' signatures."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from ..models.errors import UserError, nearest
from .compatibility_check import hold
from .config import Loaded
from .registry import Registry, optimizers, schedulers
from .registry import algorithms as algorithm_registry
from .schema import RunConfig, StageConfig

RESERVED = ("enabled", "stages")
"""Keys of a method that the run reads itself."""


def construct(
    make: Callable[..., Any], arguments: Mapping[str, Any], where: Callable[[str], str], **given: Any
) -> Any:
    """Call a constructor with keyword arguments from a configuration.

    Args:
        make: class or function.
        arguments: from the YAML.
        where: key -> its place, for messages.
        given: arguments that the run itself supplies.

    Raises:
        UserError: a keyword that the constructor does not know or of a wrong type, or one that it misses;
            or the constructor itself refuses.
    """
    check_arguments(make, arguments, where, given)
    try:
        return make(**arguments, **given)
    except UserError:
        raise
    except (TypeError, ValueError, ImportError, ArithmeticError, LookupError, AssertionError) as error:
        said = f"{type(error).__name__}: {(str(error).strip() or 'refuses these values').splitlines()[0]}"
        typed = [place for place in map(where, arguments) if place.startswith("command line")]
        raise UserError(f"{where('')}: {said}{f' [{typed[0]}]' if typed else ''}") from error


def check_arguments(
    make: Callable[..., Any],
    arguments: Mapping[str, Any],
    where: Callable[[str], str],
    given: Mapping[str, Any] = {},
) -> None:
    """Check keyword arguments against a signature without calling it; see :func:`construct`."""
    parameters = inspect.signature(make).parameters
    target = make.__init__ if isinstance(make, type) else make
    try:
        hints = get_type_hints(target)
    except Exception:  # a third party's annotations may not resolve; names are still checked
        hints = {}
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    known = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key, value in arguments.items():
        if key in given:
            raise UserError(f"{where(key)}: is set by the run itself")
        if key not in known and not open_ended:
            offered = [n for n in known if n not in given and n != "self"]
            raise UserError(f"{where(key)}: unknown key{nearest(key, offered)}")
        if key in hints and not _fits(hints[key], value):
            raise UserError(f"{where(key)}: expected {_described(hints[key])}, got {value!r}"[:300])
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and name in known
        if required and name not in arguments and name not in given:
            raise UserError(f"{where('')}: needs {name}")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a YAML value can be meant by a type; unknown kinds of types accept anything."""
    origin = get_origin(hint)
    if origin is Union or origin is types.UnionType:
        return any(_fits(o, value) for o in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is dict or origin is Mapping:
        return isinstance(value, Mapping)
    if origin is tuple and get_args(hint) and get_args(hint)[-1] is not Ellipsis:
        items = get_args(hint)
        return _is_list(value) and len(value) == len(items) and all(map(_fits, items, value))
    if origin in (list, tuple, set, Sequence, Iterable, Collection):
        return _is_list(value) and all(_fits(item, v) for item in get_args(hint)[:1] for v in value)
    if hint is torch.Tensor:  # stands beside float in torch's optimizers; no YAML value is one
        return False
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    return True


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _described(hint: Any) -> str:
    plain = isinstance(hint, type) and not get_args(hint)
    return re.sub(r"\b(typing|collections\.abc)\.", "", hint.__name__ if plain else str(hint))


def named(
    registry: Registry, spec: Mapping[str, Any], place: Callable[..., str], *path: str, **given: Any
) -> Any:
    """Build what ``name:`` says with the keys beside it."""
    where = lambda key: place(*path, key) if key else place(*path)  # noqa: E731
    if "name" not in spec:
        raise UserError(f"{where('')}: needs name: one of {', '.join(registry.names())}")
    make = registry.get(str(spec["name"]), where("name"))
    return construct(make, {k: v for k, v in spec.items() if k != "name"}, where, **given)


def mapped(
    registry: Registry,
    specs: Mapping[str, Mapping[str, Any] | None],
    place: Callable[..., str],
    section: str,
    **given: dict[str, Any],
) -> list[Any]:
    """Build every entry of a ``name: {keywords}`` section (callbacks, loggers).

    ``given``: further keywords by name, where the configuration is silent (a folder of the run and the like).
    """
    built = []
    for name, keywords in specs.items():
        where = partial(place_in, place, section, name)
        arguments = {**given.get(name, {}), **(keywords or {})}
        built.append(construct(registry.get(name, where("")), arguments, where))
    return built


def place_in(place: Callable[..., str], section: str, name: str, key: str) -> str:
    """Place of a keyword of a named thing; of the thing itself for the empty key."""
    return place(section, name, *([key] if key else []))


def enabled_algorithms(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Methods that are switched on: name -> keywords (``stages`` kept)."""
    chosen = {}
    for name, keywords in loaded.run.algorithms.items():
        algorithm_registry.get(name, loaded.where("algorithms", name))
        on = keywords.get("enabled", True)
        if not isinstance(on, bool):
            raise UserError(
                f"{loaded.where('algorithms', name, 'enabled')}: expected true or false, got {on!r}"
            )
        if on:
            chosen[name] = {k: v for k, v in keywords.items() if k != "enabled"}
    return chosen


def algorithms_of_stage(
    loaded: Loaded, stage: str, config: StageConfig, **given: dict[str, Any]
) -> dict[str, Any]:
    """Methods of one stage, built: name -> algorithm.

    A method is used in the stages that its ``stages`` names; by default those of its paper, or every stage
    where the run's stages have other names. ``config``: of the stage. ``given``: further keywords by method (report files and the like).
    """
    built = {}
    for name, keywords in enabled_algorithms(loaded).items():
        make = algorithm_registry.get(name, loaded.where("algorithms", name))
        if stage not in stages_of(loaded, name, keywords, make):
            continue
        where = partial(place_in, loaded.where, "algorithms", name)
        arguments = {k: v for k, v in keywords.items() if k not in RESERVED}
        extra = {k: v for k, v in given.get(name, {}).items() if k not in arguments}
        try:
            built[name] = construct(make, arguments, where, **extra)
        except UserError as error:
            own = re.match(rf"algorithms\.{re.escape(name)}(\.\w+)*", str(error))
            if own is None:
                raise
            # A method's own refusal names its key; a bare Trainer knows no more, a YAML has a line.
            raise UserError(f"{loaded.provenance.where(tuple(own[0].split('.')))}: {error}") from error
    hold(loaded, config, stage, built)  # what the configuration alone tells; the model tells the rest
    return built


def stages_of(loaded: Loaded, name: str, keywords: Mapping[str, Any], make: Any) -> list[str]:
    """Stages in which a method is used."""
    names = stage_names(loaded.run)
    wanted = keywords.get("stages")
    if wanted is None:
        paper = getattr(make, "stages", None)
        return [s for s in names if paper is None or s in paper or s not in ("align", "instruct")]
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(wanted, list) or not all(isinstance(stage, str) for stage in wanted):
        raise UserError(
            f"{loaded.where('algorithms', name, 'stages')}: expected a stage or a list of them, got {wanted!r}"
        )
    for stage in wanted:
        if stage not in names:
            raise UserError(
                f"{loaded.where('algorithms', name, 'stages')}: no stage '{stage}'{nearest(stage, names)}"
            )
    return wanted


def used_nowhere(loaded: Loaded) -> list[str]:
    """A line for each method that is on and used in no stage of the run."""
    lines = []
    for name, keywords in enabled_algorithms(loaded).items():
        where = loaded.where("algorithms", name)
        make = algorithm_registry.get(name, where)
        if not stages_of(loaded, name, keywords, make):
            paper = " and ".join(getattr(make, "stages", ()))
            lines.append(
                f"{where}: is used in no stage of this run ({', '.join(stage_names(loaded.run))}): its paper uses it in "
                f"{paper}; algorithms.{name}.stages says otherwise"
            )
    return lines


def stage_names(run: RunConfig) -> list[str]:
    """Names of the run's stages, in order."""
    return list(run.stages) or [run.stage]


def build_optimizer(stage: StageConfig, groups: list[dict[str, Any]], place: Callable[..., str]) -> Any:
    """The optimizer over parameter groups (each has its own ``lr`` and ``weight_decay``)."""
    spec = {k: v for k, v in stage.optimizer.items() if k != "weight_decay"}
    spec.setdefault("lr", 2.0e-5)
    return named(optimizers, spec, place, "optimizer", params=groups)


def build_scheduler(stage: StageConfig, place: Callable[..., str]) -> Any:
    """The learning-rate schedule."""
    return named(schedulers, stage.scheduler, place, "scheduler")
