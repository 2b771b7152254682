"""What the guard against non-finite numbers and the loss ledger cost a step.

Runs in ``composer.Trainer`` on the same batch, in turns: without either, with ``NonFinite``, with ``LossLedger``, with both
(what every run has), and with a ledger that asks for the gradient of each term in every step. A ratio of two steps
cannot show a thousandth on a machine in use, so the time inside the callbacks is measured, too.
"""

from __future__ import annotations

import time
from typing import Any

import report

report.quiet()

from composer.core import Callback, Event, State  # noqa: E402
from composer.loggers import Logger  # noqa: E402
from measure import agreeing, interleave, quartiles, ratio  # noqa: E402
from shapes import SHAPES, build, text_batch  # noqa: E402
from steps import adamw, composer_trainer  # noqa: E402

from opsin.models.vlm import VisionLanguageModel  # noqa: E402
from opsin.training.loss_ledger import LossLedger  # noqa: E402
from opsin.training.non_finite import NonFinite  # noqa: E402

NAME = "watch_cost"


class Clocked(Callback):
    """Callbacks, and the seconds spent in them, step by step."""

    def __init__(self, *callbacks: Callback):
        self.callbacks = callbacks
        self.spent: list[float] = []

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Pass an event on."""
        if event == Event.BEFORE_TRAIN_BATCH:  # their first of a step
            self.spent.append(0.0)
        begun = time.perf_counter()
        for callback in self.callbacks:
            callback.run_event(event, state, logger)
        if self.spent:
            self.spent[-1] += time.perf_counter() - begun


def measure(shape: str, options: Any) -> dict[str, Any]:
    """Times of all variants at one shape."""
    device = options.device
    built = build(shape, device)
    optimizer = adamw(built.hf)
    model = VisionLanguageModel(built.hf, built.processor).train()
    batch = text_batch(built)
    watched = {
        "none": [],
        "non_finite": [NonFinite()],
        "ledger": [LossLedger()],
        "both": [NonFinite(), LossLedger()],
        "asked": [LossLedger(gradient_share_interval=1)],
    }
    clocks = {name: Clocked(*callbacks) for name, callbacks in watched.items()}
    runs = {
        name: composer_trainer(model, optimizer, batch, built.burst, device, callbacks=[clock])
        for name, clock in clocks.items()
    }
    agreeing({name: run().loss for name, run in runs.items()}, tolerance=1e-7)
    for clock in clocks.values():
        clock.spent.clear()
    rounds = options.rounds or (2 if options.quick else 15)
    series = interleave(
        runs, rounds=rounds, seconds=options.seconds or 40.0, warmup=0, least=2 if options.quick else 3
    )
    return {
        "seconds": {name: s.as_dict() for name, s in series.items()},
        "over_none": {name: ratio(s, series["none"]) for name, s in series.items() if name != "none"},
        "inside_s": {name: quartiles(clock.spent)[1] for name, clock in clocks.items()},
        "inside_share": {
            name: quartiles(clock.spent)[1] / series[name].median for name, clock in clocks.items()
        },
    }


def main() -> None:
    """Measure all shapes that were asked for."""
    options = report.parser(__doc__, SHAPES).parse_args()
    found = [{"shape": shape, **measure(shape, options)} for shape in options.shape or SHAPES]
    rows = [
        (
            one["shape"],
            name,
            f"{1e3 * one['seconds'][name]['median_s']:.1f}",
            report.spread(one["over_none"][name]),
            f"{1e3 * one['inside_s'][name]:.2f} ms = {one['inside_share'][name]:.2%}",
        )
        for one in found
        for name in one["over_none"]
    ]
    columns = ("shape", "watched by", "ms a step", "over none", "inside")
    report.table("cost of watching losses (ratios with quartiles of rounds)", columns, rows)
    report.save(NAME, options.quick, {"environment": report.environment(options.device), "runs": found})


if __name__ == "__main__":
    main()
