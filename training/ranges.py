"""What the values of a run's keys may be, beyond their types: one table of key path -> rule.

Composer, Streaming and torch would refuse most of these too, but after data is made and a model built, with a
traceback, and without the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from composer.core import Precision, Time, TimeUnit

from ..models.errors import UserError, nearest
from .config import Loaded
from .stages import Stage

Rule = Callable[[Any], str | None]
"""Value -> what is wrong with it, or None."""


def at_least(least: float, most: float = float("inf"), above: bool = False) -> Rule:
    """A number from ``least`` (``above``: greater than it) to ``most``."""
    said = f"above {least:g}" if above else f"{least:g} or more"
    if most != float("inf"):
        said = f"{least:g} to {most:.10g}"

    def complaint(value: Any) -> str | None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # Written so that nan fails.
        good = number and (value > least if above else value >= least) and value <= most
        return None if good else f"expected a number, {said}, got {value!r}"

    return complaint


def one_of(*known: str, any_case: bool = False, **meant: str) -> Rule:
    """One of some names; ``meant``: what else people write -> the right name."""

    def complaint(value: Any) -> str | None:
        if (value.lower() if any_case else value) in known:
            return None
        hint = f"; did you mean '{meant[value]}'?" if value in meant else nearest(str(value), known)
        return f"'{value}': unknown{hint}"

    return complaint


_UNITS = "ba, ep, sp, tok, sec, dur"


def time(least: float = 0.0, above: bool = False, whole_run: bool = False) -> Rule:
    """A time string of Composer's (``250ba``, ``3ep``, ``0.1dur``).

    ``whole_run``: says how long the run is, so it cannot be a share of that.
    """

    def complaint(value: Any) -> str | None:
        if isinstance(value, str) and value.strip().lstrip("+-").replace(".", "", 1).isdigit():
            return f"'{value}': which unit ({_UNITS})? for example {value}ba"
        try:
            parsed = Time.from_timestring(value)
        except (ValueError, TypeError, AssertionError):
            return f"'{value}': no time; a whole number and a unit ({_UNITS}), for example 100ba"
        if whole_run and parsed.unit in (TimeUnit.DURATION, TimeUnit.ITERATION):
            return f"'{value}': needs a length of its own: ba, ep, sp, tok or sec"
        if not (parsed.value > least if above else parsed.value >= least):
            return f"'{value}': must be {'more than' if above else 'at least'} {least:g}"
        return None

    return complaint


_LOADER: dict[str, Rule] = {
    "num_workers": at_least(0),
    "prefetch_factor": at_least(1),
    "timeout": at_least(0),
    "pad_to_multiple_of": at_least(1),
    "padding_side": one_of("left", "right"),
    "turns": one_of("meta", "chained", "independent"),
    "batch_size": at_least(1),
    "limit": at_least(1),
}

_DATASET: dict[str, Rule] = {
    "shuffle_seed": at_least(0, 2**32 - 1),
    "shuffle_block_size": at_least(1),
    "num_canonical_nodes": at_least(1),
    "predownload": at_least(0),
    "download_retry": at_least(0),
    "download_timeout": at_least(0, above=True),
}

STAGE: dict[str, Rule] = {
    "max_duration": time(above=True, whole_run=True),
    "eval_interval": time(),
    "max_seq_len": at_least(1),
    "global_train_batch_size": at_least(1),
    "device_train_microbatch_size": at_least(1),
    "optimizer.lr": at_least(0),
    "optimizer.weight_decay": at_least(0),
    "lr_by_part.*": at_least(0),
    **{f"scheduler.{key}": time() for key in ("t_warmup", "t_max", "t_0", "milestones.*")},
    **{f"train_loader.{key}": rule for key, rule in _LOADER.items()},
    **{f"train_loader.dataset.{key}": rule for key, rule in _DATASET.items()},
    **{f"eval_loaders.*.{key}": rule for key, rule in _LOADER.items()},
    **{f"eval_loaders.*.dataset.{key}": rule for key, rule in _DATASET.items()},
}
"""Keys of a stage; ``*`` is any one key or index."""

RUN: dict[str, Rule] = {
    "seed": at_least(0, 2**32 - 1),
    "precision": one_of(*(p.value for p in Precision), bf16="amp_bf16", fp16="amp_fp16", fp8="amp_fp8"),
    "device": one_of("cpu", "gpu", "mps", cuda="gpu"),
    "save_interval": time(),
    "save_num_checkpoints_to_keep": at_least(-1),
    "non_finite": one_of("stop", "skip"),
    "max_skipped_batches": at_least(0),
    "dist_timeout": at_least(0, above=True),
    "python_log_level": one_of("debug", "info", "warning", "error", "critical", any_case=True),
    "preflight.batches": at_least(0),
    "preflight.max_unlabelled": at_least(0, 1),
    "preflight.max_skipped": at_least(0, 1),
    "evaluation.batch_size": at_least(1),
    "evaluation.limit": at_least(1),
    "evaluation.pictures": at_least(0),
    **{f"evaluation.dataset.{key}": rule for key, rule in _DATASET.items()},
    **{f"evaluation.majority_from.{key}": rule for key, rule in _DATASET.items()},
    "model.seed": at_least(0),
    **{f"model.{key}": at_least(1) for key in ("image_size", "patch_size", "hidden_size", "layers", "heads")},
    **{f"model.{key}": at_least(1) for key in ("vision_width", "vision_layers")},
}
"""Keys of the whole run."""


def refuse_out_of_range(loaded: Loaded, stages: list[Stage]) -> None:
    """Hold the run and every stage against the tables.

    Raises:
        UserError: a value that cannot be; place, key, and what it may be.
    """
    _hold(loaded.run, RUN, loaded.where)
    for stage in stages:
        _hold(stage.config, STAGE, place_in_stage(loaded, stage))


def refuse_other_machine(loaded: Loaded) -> None:
    """Refuse a device that this machine does not have, and a precision that the device does not have.

    Raises:
        UserError: with what can be had here.
    """
    run = loaded.run
    gpu = torch.cuda.is_available()
    if (run.device == "gpu" and not gpu) or (run.device == "mps" and not torch.backends.mps.is_available()):
        other = "gpu" if gpu else "cpu"
        raise UserError(f"{loaded.where('device')}: '{run.device}': none is available here; use {other}")
    on_cpu = run.device == "cpu" or (run.device is None and not gpu)
    if on_cpu and run.precision in ("amp_fp16", "amp_fp8"):
        raise UserError(f"{loaded.where('precision')}: '{run.precision}': needs a GPU; use fp32 or amp_bf16")


def place_in_stage(loaded: Loaded, stage: Stage) -> Callable[..., str]:
    """Key -> its place, for messages: in the stage's section, or among the run's defaults."""
    return lambda *key: loaded.provenance.where_in_stage(stage.path, key)


def _hold(config: Any, table: dict[str, Rule], place: Callable[..., str]) -> None:
    for path, value in _leaves(config, ()):
        for pattern, rule in table.items():
            said = rule(value) if _matches(path, pattern.split(".")) else None
            if said is not None:
                raise UserError(f"{place(*path)}: {said}")


def _matches(path: tuple[str, ...], pattern: list[str]) -> bool:
    return len(path) == len(pattern) and all(p in ("*", key) for key, p in zip(path, pattern, strict=True))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key path of a configuration with its value; what is not set has none."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*path, str(key)))
    elif value is not None:
        yield path, value
