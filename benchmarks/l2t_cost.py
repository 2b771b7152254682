"""What L2T costs: at equal labelled tokens, and in total beside the share of tokens that are labelled.

Three runs in ``composer.Trainer`` on the same pictures and words:

* ``response``: ordinary instruction tuning, only responses are labelled.
* ``widened``: no algorithm, but the batch comes with the labels that L2T would make.
* ``l2t``: the algorithm makes them.

``l2t`` over ``widened`` is the algorithm's own cost; ``l2t`` over ``response`` is what a user pays, nearly all
of it the head at more positions. A ratio of two steps cannot show a thousandth on a machine in use, so the time
that is spent inside the algorithm's event handlers is measured, too.
"""

from __future__ import annotations

import time
from typing import Any

import report

report.quiet()

import torch  # noqa: E402
from composer.core import Event, State  # noqa: E402
from composer.loggers import Logger  # noqa: E402
from measure import Variant, agreeing, interleave, quartiles, ratio  # noqa: E402
from shapes import SHAPES, build, text_batch  # noqa: E402
from steps import adamw, composer_trainer  # noqa: E402

from opsin.algorithms.l2t import L2T  # noqa: E402
from opsin.algorithms.l2t.functional import instruction_mask, l2t_labels  # noqa: E402
from opsin.models.vlm import VisionLanguageModel  # noqa: E402

NAME = "l2t_cost"
TARGET = 0.01
MASK_KEYS = ("roles", "turn_ids", "branch_ids", "document_ids", "image_ids", "sentence_ids")


class Clocked(L2T):
    """L2T that adds up the time spent in its handlers, step by step."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.spent: list[float] = []

    def apply(self, event: Event, state: State, logger: Logger) -> int | None:
        if event == Event.AFTER_DATALOADER:  # its first event of a step
            self.spent.append(0.0)
        begun = time.perf_counter()
        done = super().apply(event, state, logger)
        if self.spent:
            self.spent[-1] += time.perf_counter() - begun
        return done


def widened(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with instruction tokens labelled beforehand."""
    learnt = instruction_mask(
        **{key: batch[key] for key in MASK_KEYS}, templates=torch.zeros(0, dtype=torch.int64)
    )
    return {**batch, "labels": l2t_labels(batch["labels"], batch["input_ids"], learnt)}


def labelled(batch: dict[str, torch.Tensor]) -> float:
    """Share of the tokens that have a label."""
    return float((batch["labels"] != -100).float().mean())


def measure(shape: str, instruction: float, options: Any) -> dict[str, Any]:
    """Times of the three runs at one shape and one share of instruction tokens."""
    device = options.device
    built = build(shape, device)
    optimizer = adamw(built.hf)
    model = VisionLanguageModel(built.hf, built.processor).train()
    plain = text_batch(built, instruction=instruction)
    wide = widened(plain)
    method = Clocked(template_source="none")

    def run(batch: dict, algorithms: list[Any]) -> Variant:
        return composer_trainer(model, optimizer, batch, built.burst, device, algorithms)

    runs: dict[str, Variant] = {
        "response": run(plain, []),
        "widened": run(wide, []),
        "l2t": run(plain, [method]),
    }
    losses = {name: variant().loss for name, variant in runs.items()}
    agreeing({name: losses[name] for name in ("widened", "l2t")})
    method.spent.clear()
    series = interleave(
        runs,
        rounds=options.rounds or (2 if options.quick else 20),
        seconds=options.seconds or (50.0 if built.burst == 1 else 8.0),
        warmup=0,
        least=2 if options.quick else 3,
    )
    handlers = quartiles(method.spent)[1]
    return {
        "instruction_share": instruction,
        "labelled_share": {"response": labelled(plain), "l2t": labelled(wide)},
        "vocabulary": built.vocabulary,
        "loss": losses,
        "variants": {name: one.as_dict() for name, one in series.items()},
        "at_equal_labels": ratio(series["l2t"], series["widened"]),
        "total": ratio(series["l2t"], series["response"]),
        "handlers_s": handlers,
        "handlers_share": handlers / series["l2t"].median,
    }


def show(found: list[dict[str, Any]]) -> None:
    """One table of all shapes."""
    rows = []
    for one in found:
        before, after = one["labelled_share"]["response"], one["labelled_share"]["l2t"]
        rows.append(
            (
                one["shape"],
                f"{before:.0%} -> {after:.0%}",
                *(
                    f"{1e3 * one['variants'][name]['median_s']:.1f}"
                    for name in ("response", "widened", "l2t")
                ),
                report.spread(one["at_equal_labels"]),
                f"{1e3 * one['handlers_s']:.2f} ms = {one['handlers_share']:.2%}",
                report.spread(one["total"]),
            )
        )
    columns = (
        "shape",
        "labelled",
        "response",
        "widened",
        "L2T, ms",
        "L2T / widened",
        "in handlers",
        "L2T / response",
    )
    report.table("cost of L2T (ratios with quartiles of rounds)", columns, rows)


def main() -> None:
    """Measure all shapes that were asked for."""
    parser = report.parser(__doc__, SHAPES)
    parser.add_argument(
        "--instruction", type=float, action="append", help="share of tokens that the user says"
    )
    options = parser.parse_args()
    found = []
    for shape in options.shape or SHAPES:
        # A large model's cost does not depend on it in a way that is worth the minutes.
        shares = options.instruction or ([0.3] if shape == "smollm2-135m" else [0.15, 0.3])
        found += [{"shape": shape, **measure(shape, share, options)} for share in shares]
    show(found)
    worst = max(one["handlers_share"] for one in found)
    report.console().print(
        f"target: within {TARGET:.0%} at equal labels; handlers take at most {worst:.2%} of a step"
    )
    body = {
        "environment": report.environment(options.device),
        "runs": found,
        "target": {"share": TARGET, "handlers_share_at_most": worst},
    }
    report.save(NAME, options.quick, body)


if __name__ == "__main__":
    main()
