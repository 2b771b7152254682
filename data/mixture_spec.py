"""A mixture as a YAML writes it, checked and in numbers of global batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from composer.core import Time, TimeUnit

from ..models.errors import UserError, nearest
from .mixture import BATCHES, Mixture
from .schedule import RAMPS

KEYS = ("phases", "weights", "ramp", "batches", "duration")

KINDS = ("caption", "text", "instruction")
"""What a stream holds: pictures with captions and no question; no pictures; questions about pictures."""


def make_mixture(
    spec: Mapping[str, Any], names: Sequence[str], sizes: Sequence[int], global_batch: int, epoch_size: int
) -> Mixture:
    """The mixture of a dataset.

    Args:
        spec: ``weights`` (stream -> weight) where they never change, or ``phases``: a list of ``{start, weights}``,
            ``start`` in Composer's notation (``0ba``, ``2ep``, ``5000sp``, ``0.3dur``), taken to the next whole global
            batch; ``ramp`` (``step`` or ``linear``); ``batches`` (``mixed`` or ``single``); ``duration``: what ``dur`` is
            a share of (a run's ``max_duration``).
        names: of the streams.
        sizes: samples of each.
        global_batch: samples of all ranks a step.
        epoch_size: samples an epoch, a multiple of it.

    Raises:
        UserError: a key, a name, a weight or a time that makes no schedule.
    """
    where = "dataset.mixture"
    if not isinstance(spec, Mapping):
        raise UserError(f"{where}: '{spec}': give weights or phases")
    for key in spec:
        if key not in KEYS:
            raise UserError(f"{where}.{key}: unknown key{nearest(str(key), KEYS)}")
    for key, known in (("ramp", RAMPS), ("batches", BATCHES)):
        if spec.get(key, known[0]) not in known:
            raise UserError(f"{where}.{key} '{spec[key]}': unknown{nearest(str(spec[key]), known)}")
    if ("phases" in spec) == ("weights" in spec):
        raise UserError(f"{where}: give either weights or phases")
    listed = spec["phases"] if "phases" in spec else [{"start": "0ba", "weights": spec["weights"]}]
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise UserError(f"{where}.phases: '{listed}': give a list of {{start: 0ba, weights: {{...}}}}")
    phases: list[tuple[int, dict[str, float]]] = []
    for i, phase in enumerate(listed):
        at = f"{where}.phases.{i}" if "phases" in spec else where
        if not isinstance(phase, Mapping) or set(phase) != {"start", "weights"}:
            raise UserError(f"{at}: '{phase}': a phase has start and weights")
        start = _batch(phase["start"], f"{at}.start", global_batch, epoch_size, spec.get("duration"))
        if start != 0 if not phases else start <= phases[-1][0]:
            must = (
                "start at 0ba"
                if not phases
                else f"come after the one before, which starts at {phases[-1][0]}ba"
            )
            raise UserError(f"{at}.start: {phase['start']} is {start}ba; this phase must {must}")
        phases.append((start, check_weights(phase["weights"], names, f"{at}.weights")))
    return Mixture(
        names, phases, sizes=sizes, global_batch=global_batch, epoch_size=epoch_size,
        ramp=spec.get("ramp", RAMPS[0]), batches=spec.get("batches", BATCHES[0]),
    )  # fmt: skip


def take_kinds(
    streams: Mapping[str, Mapping[str, Any]], mixture: Mapping[str, Any] | None
) -> tuple[dict[str, dict[str, Any]], list[str | None], Mapping[str, Any] | None]:
    """What a configuration says of its streams beside where they are: ``kind`` and ``weight``.

    Returns:
        the streams without these keys; the kind of each (:data:`KINDS`, or None); the mixture, made of the weights where
        they stand with the streams.

    Raises:
        UserError: an unknown kind, or weights in two places or for some streams only.
    """
    kinds: list[str | None] = []
    weights: dict[str, Any] = {}
    rest: dict[str, dict[str, Any]] = {}
    for name, options in streams.items():
        rest[name] = {k: v for k, v in options.items() if k not in ("kind", "weight")}
        kind = options.get("kind")
        if kind is not None and kind not in KINDS:
            raise UserError(f"dataset.streams.{name}.kind '{kind}': unknown{nearest(str(kind), KINDS)}")
        kinds.append(kind)
        if options.get("weight") is not None:
            weights[name] = options["weight"]
    if not weights:
        return rest, kinds, mixture
    for name in streams:
        if name not in weights:
            raise UserError(
                f"dataset.streams.{name}: it has no weight, and other streams do; 0 leaves it out"
            )
    if mixture is not None and ("weights" in mixture or "phases" in mixture):
        raise UserError("dataset: weights stand in streams and in mixture; give them in one place")
    return rest, kinds, {**(mixture or {}), "weights": weights}


def refuse_other_weights(streams: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]) -> None:
    """Refuse what a mixture takes the place of.

    Raises:
        UserError: weights of streams, or a batching method.
    """
    for name, stream in streams.items():
        for key in ("proportion", "repeat", "choose"):
            if stream.get(key) is not None:
                raise UserError(
                    f"dataset.streams.{name}.{key}: weights stand in dataset.mixture; give them in one place"
                )
    if options.get("batching_method", "random") != "random":
        raise UserError(
            f"dataset: batching_method '{options['batching_method']}' and a mixture exclude each other"
        )


def check_weights(weights: Any, names: Sequence[str], where: str) -> dict[str, float]:
    """Weights of streams, by name; those that are not named get 0.

    Raises:
        UserError: an unknown stream, a weight that is none, or nothing but zeros.
    """
    if not isinstance(weights, Mapping):
        raise UserError(f"{where}: '{weights}': give a weight for each stream: {', '.join(names)}")
    for name, weight in weights.items():
        if name not in names:
            raise UserError(f"{where}.{name}: no such stream{nearest(str(name), names)}")
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight >= 0):
            raise UserError(f"{where}.{name}: {weight}: use 0 (off) or more")
    if not any(weights.values()):
        raise UserError(f"{where}: all are 0, so there is nothing to train on")
    return {str(name): float(weight) for name, weight in weights.items()}


def _batch(start: Any, where: str, global_batch: int, epoch_size: int, duration: Any) -> int:
    """The first whole global batch at or after a time of training."""
    whole = isinstance(start, int) and not isinstance(start, bool)
    if not whole and not isinstance(start, str):
        raise UserError(f"{where}: {start}: use a number of batches, or 100ba, 2ep, 5000sp or 0.3dur")
    try:
        time = Time.from_timestring(start) if isinstance(start, str) else Time(start, TimeUnit.BATCH)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: '{start}' is no time; use 100ba, 2ep, 5000sp or 0.3dur") from error
    samples = _samples(time, global_batch, epoch_size)
    if time.unit == TimeUnit.DURATION:
        try:
            of = _samples(Time.from_timestring(str(duration)), global_batch, epoch_size)
        except (ValueError, TypeError):
            of = None
        if of is None:
            raise UserError(
                f"{where}: {start} needs a duration in ba, ep or sp (a run's max_duration), not {duration}"
            )
        samples = of * time.value
    if samples is None or not 0 <= samples < math.inf:
        raise UserError(f"{where}: '{start}': use ba, ep, sp or dur, from 0 on")
    return math.ceil(samples / global_batch - 1e-9)


def _samples(time: Time, global_batch: int, epoch_size: int) -> float | None:
    each = {TimeUnit.BATCH: global_batch, TimeUnit.EPOCH: epoch_size, TimeUnit.SAMPLE: 1}.get(time.unit)
    return None if each is None else time.value * each
