"""A stage, held against the table of :mod:`.compatibility`: refusals before anything is trained, and warnings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ..algorithms.base import VisionAlgorithm
from ..models.errors import UserError
from .compatibility import REFUSED, holds, of_method, of_run, parsed, said
from .composer_rules import RULES
from .config import Loaded
from .schema import StageConfig

if TYPE_CHECKING:
    from .stages import Stage


def facts_of(
    loaded: Loaded, config: StageConfig, stage: str, model: Any = None, here: bool = False
) -> dict[str, Any]:
    """Settings of a stage by name; what only a built model or the machine of the run tells is left out without."""
    run = loaded.run
    parallel = run.parallelism_config or {}
    facts: dict[str, Any] = {
        "packing": config.train_loader.packing,
        "turns": config.train_loader.turns,
        "lora": config.peft_config is not None,
        "fsdp2": "fsdp2" in parallel,
        "compile": config.compile not in (False, None),
        "activation_checkpointing": config.activation_checkpointing,
        "precision": run.precision,
        "stage": stage,
    }
    if run.device is not None or here:
        facts["device"] = run.device or ("gpu" if torch.cuda.is_available() else "cpu")
    for key in ("attn_implementation", "bidirectional_images"):
        if run.model.get(key) is not None:
            facts[key] = run.model[key]
    if model is not None:
        facts["family"] = model.anatomy.family
        facts["attn_implementation"] = model.anatomy.decoder(model.hf).config._attn_implementation
        facts["bidirectional_images"] = model.net.bidirectional_images
    return facts


def hold(
    loaded: Loaded,
    config: StageConfig,
    stage: str,
    algorithms: Mapping[str, Any],
    model: Any = None,
    here: bool = False,
) -> list[str]:
    """Hold a stage against the table.

    Args:
        loaded: the configuration.
        config, stage: the stage's keys and name.
        algorithms: its methods by name, built.
        model: built (also on the meta device); None: only what the configuration tells is looked at.
        here: it is to be trained on this machine.

    Returns:
        warnings, a line each, with their place.

    Raises:
        UserError: something is refused.
    """
    facts = facts_of(loaded, config, stage, model, here)
    lacks = {} if model is None else getattr(model.anatomy, "refuses", {})

    def setting(key: str) -> Any:
        current: Any = config if hasattr(config, key.split(".")[0]) else loaded.run
        for part in key.split("."):
            if isinstance(current, Mapping) and part in current:
                current = current[part]
            elif not isinstance(current, Mapping) and hasattr(current, part):
                current = getattr(current, part)
            else:
                raise LookupError(key)
        return current

    warned = []
    for verdict in of_run(facts, lacks):
        if verdict.status == REFUSED:
            raise UserError(f"stage {stage}: {verdict.setting} do not go together ({verdict.why})")
        warned.append(f"stage {stage}: {verdict.setting}: {verdict.why}")
    for name, algorithm in algorithms.items():
        place = loaded.where("algorithms", name)
        if not isinstance(algorithm, VisionAlgorithm):
            for status, conditions, why in _of_composers(name, facts):
                beside = f" beside {conditions}" if conditions else ""
                if status == REFUSED:
                    raise UserError(f"{place}: does not work with a vision-language model{beside} ({why})")
                warned.append(f"{place}{beside}: {why}")
            continue
        if algorithm.is_off():
            continue

        def keyword(key: str, algorithm: Any = algorithm) -> Any:
            if not hasattr(algorithm, key):
                raise LookupError(key)
            return getattr(algorithm, key)

        for verdict in of_method(algorithm, facts, lacks, setting, keyword):
            only = f" with {verdict.only}" if verdict.only else ""
            if verdict.status == REFUSED:
                raise UserError(f"{place}{only}: {verdict.line()}")
            warned.append(f"{place}{only}: {verdict.line()}")
    return warned


def hold_callback(loaded: Loaded, stages: Iterable[Stage], name: str, callback: Any) -> None:
    """Hold one of our callbacks against the table; it may declare ``refuses``, as methods do.

    Raises:
        UserError: a stage has what it refuses.
    """
    for stage in stages:
        for verdict in of_method(callback, facts_of(loaded, stage.config, stage.name), {}):
            if verdict.status == REFUSED:
                raise UserError(f"{loaded.where('callbacks', name)}: {verdict.line()}")


def _of_composers(name: str, facts: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(status, settings, why) of one of Composer's own algorithms."""
    for conditions, (status, why) in RULES.get(name, {}).items():
        held = parsed(conditions) if conditions else []
        if all(n in facts and holds(facts[n], equal, value) for n, equal, value in held):
            yield status, " and ".join(said(n, facts[n]) for n, _, _ in held), why


def print_warnings(console: Console, warnings: list[str]) -> None:
    """A line each, before anything is trained."""
    for warning in warnings:
        console.print(f"warning: {warning}", soft_wrap=True, highlight=False)
