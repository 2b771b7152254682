"""Rules by which a metric changes the mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.mixture_spec import check_weights
from ...models.errors import UserError, nearest

KEYS = ("metric", "below", "above", "weights")
OWN, EVALUATED = "vift/nll/", "metrics/"


@dataclass(frozen=True)
class Rule:
    """When ``metric`` is below or above ``limit``, the streams get ``weights``."""

    metric: str
    side: str
    limit: float
    weights: dict[str, float]

    @property
    def text(self) -> str:
        """The rule in one line; by it a checkpoint knows it again."""
        weights = ", ".join(f"{k} {v:g}" for k, v in self.weights.items())
        return f"{self.metric} {self.side} {self.limit:g}: {weights}"

    def holds(self, value: float) -> bool:
        """Whether the metric asks for the change; a NaN never does."""
        return value < self.limit if self.side == "below" else value > self.limit

    def check(self, streams: Sequence[str], where: str) -> None:
        """Refuse streams that there are not."""
        name = self.metric.removeprefix(OWN)
        if self.metric.startswith(OWN) and name not in streams:
            raise UserError(f"{where}.rules: metric '{self.metric}': no such stream{nearest(name, streams)}")
        check_weights(self.weights, streams, f"{where}.rules.weights")

    def check_evaluators(self, evaluated: Mapping[str, Mapping[str, Any]], where: str) -> None:
        """Refuse metrics of evaluators that there are not; ``evaluated``: label -> metrics by name."""
        if not self.metric.startswith(EVALUATED):
            return
        _, label, name = self.metric.split("/", 2)
        if label not in evaluated:
            raise UserError(
                f"{where}.rules: metric '{self.metric}': no evaluator '{label}'{nearest(label, evaluated)}"
            )
        if name not in evaluated[label]:
            known = [f"{EVALUATED}{label}/{known}" for known in evaluated[label]]
            raise UserError(f"{where}.rules: metric '{self.metric}': unknown{nearest(self.metric, known)}")

    def value(self, nll: Mapping[str, float | None], evaluated: Mapping[str, Any]) -> float | None:
        """The metric's value, the same on all ranks; None: there is none yet."""
        if self.metric.startswith(OWN):
            return nll[self.metric.removeprefix(OWN)]
        _, label, name = self.metric.split("/", 2)
        metrics = evaluated[label]
        if not metrics[name].update_called:
            return None
        value = float(metrics[name].compute())
        return None if math.isnan(value) else value


def make_rules(given: Sequence[Mapping[str, Any]], where: str) -> list[Rule]:
    """Rules as a YAML writes them.

    Raises:
        UserError: a key or a value that makes no rule.
    """
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise UserError(f"{where}: '{given}': give a list of {{metric, below or above, weights}}")
    rules = []
    for i, rule in enumerate(given):
        at = f"{where}.{i}"
        if not isinstance(rule, Mapping):
            raise UserError(f"{at}: '{rule}': a rule has metric, below or above, and weights")
        for key in rule:
            if key not in KEYS:
                raise UserError(f"{at}.{key}: unknown key{nearest(str(key), KEYS)}")
        sides = [side for side in ("below", "above") if side in rule]
        if "metric" not in rule or "weights" not in rule or len(sides) != 1:
            raise UserError(f"{at}: a rule has metric, below or above, and weights")
        metric, limit, weights = str(rule["metric"]), rule[sides[0]], rule["weights"]
        known = (f"{OWN}STREAM", f"{EVALUATED}LABEL/NAME")
        own = metric.startswith(OWN) and len(metric) > len(OWN)
        if not own and not (metric.startswith(EVALUATED) and metric.count("/") >= 2):
            raise UserError(f"{at}.metric '{metric}': use {known[0]} or {known[1]}")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            raise UserError(f"{at}.{sides[0]}: {limit}: use a number")
        if not isinstance(weights, Mapping):
            raise UserError(f"{at}.weights: '{weights}': give a weight for each stream")
        rules.append(Rule(metric, sides[0], float(limit), dict(weights)))
    return rules
