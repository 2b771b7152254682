"""Questions that share pictures: rows of their own, branches of one row, and packed rows.

* ``split``: every question is a sample with its own copy of the picture.
* ``branches``: the four questions about a picture in one row, picture encoded once, none sees another
  (``meta.turns: independent``, the default).
* ``packed``: several such documents in a row.

All three train on the same question-answer pairs in a step and must give the same loss.
"""

from __future__ import annotations

import time
from typing import Any

import report

report.quiet()

from measure import Timed, Variant, agreeing, interleave, quartiles, ratio  # noqa: E402
from shapes import Built, build, questions  # noqa: E402
from steps import adamw, loop, opsin_step  # noqa: E402

from opsin.data.chat import asked_alone  # noqa: E402
from opsin.models.vlm import VisionLanguageModel  # noqa: E402

NAME = "packing"
SHAPES = ("smollm2-135m", "toy")
PICTURES = 4
ROW = 320
"""Most tokens of a packed row: two documents of about 150, so that four pictures fill two rows."""
TARGET = 1.8


def alone(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record of several questions as one record a question, each with the picture."""
    turns = record["conversations"]
    users = asked_alone([t["value"] for t in turns[::2]])
    return [
        {
            **record,
            "id": f"{record['id']}/{i}",
            "conversations": [{"from": "human", "value": user}, answer],
        }
        for i, (user, answer) in enumerate(zip(users, turns[1::2], strict=True))
    ]


def batches(built: Built, pictures: int) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """The device batch of each layout, and the milliseconds that making one took (five times)."""
    records = questions(pictures)
    layouts = {
        "split": (built.collator(), [one for record in records for one in alone(record)]),
        "branches": (built.collator(), records),
        "packed": (built.collator(max_seq_len=ROW, packing=True), records),
    }
    made, took = {}, {}
    for name, (collate, samples) in layouts.items():
        took[name] = []
        for _ in range(5):
            begun = time.perf_counter()
            made[name] = collate(samples)
            took[name].append(1e3 * (time.perf_counter() - begun))
    return made, took


def measure(shape: str, options: Any) -> dict[str, Any]:
    """Times of all layouts at one shape."""
    built = build(shape, options.device)
    optimizer = adamw(built.hf)
    model = VisionLanguageModel(built.hf, built.processor).train()
    made, collating = batches(built, options.pictures)
    pairs = options.pictures * 4

    def variant(batch: dict) -> Variant:
        return loop(lambda: opsin_step(model, optimizer, batch, options.device), built.burst, options.device)

    runs = {name: variant(batch) for name, batch in made.items()}
    first: dict[str, Timed] = {name: run() for name, run in runs.items()}
    agreeing({name: timed.loss for name, timed in first.items()})
    series = interleave(
        runs,
        rounds=options.rounds or (2 if options.quick else 15),
        seconds=options.seconds or (40.0 if built.burst == 1 else 10.0),
        warmup=0,
        least=2 if options.quick else 3,
    )
    found: dict[str, Any] = {"pairs_a_step": pairs, "pictures": options.pictures, "layouts": {}}
    for name, one in series.items():
        mask = made[name]["attention_mask"]
        found["layouts"][name] = {
            **one.as_dict(),
            "pairs_per_s": pairs / one.median,
            "rows": mask.shape[0],
            "tokens_a_row": mask.shape[1],
            "tokens": int(mask.sum()),
            "padding_share": 1 - float(mask.float().mean()),
            "loss": first[name].loss,
            "collate_ms": quartiles(collating[name])[1],
        }
    found["ratios"] = {
        f"{name} over split": ratio(series["split"], series[name]) for name in ("branches", "packed")
    }
    return found


def show(shape: str, body: dict[str, Any]) -> None:
    """Tables of one shape."""
    rows = [
        (
            name,
            f"{one['rows']} x {one['tokens_a_row']}",
            one["tokens"],
            f"{one['padding_share']:.0%}",
            f"{1e3 * one['median_s']:.1f}",
            f"{one['pairs_per_s']:.2f}",
            f"{one['collate_ms']:.1f}",
        )
        for name, one in body["layouts"].items()
    ]
    title = f"{shape}: {body['pairs_a_step']} question-answer pairs about {body['pictures']} pictures a step"
    report.table(title, ("layout", "rows", "tokens", "padding", "step, ms", "pairs/s", "collating, ms"), rows)
    ratios = [(name, report.spread(found)) for name, found in body["ratios"].items()]
    report.table("how many times faster (quartiles of rounds)", ("pair", "ratio"), ratios)


def main() -> None:
    """Measure all shapes that were asked for."""
    parser = report.parser(__doc__, SHAPES)
    parser.add_argument("--pictures", type=int, default=PICTURES, help="pictures a step, four questions each")
    options = parser.parse_args()
    body: dict[str, Any] = {"environment": report.environment(options.device), "shapes": {}}
    for shape in options.shape or SHAPES:
        body["shapes"][shape] = measure(shape, options)
        show(shape, body["shapes"][shape])
    best = {shape: max(r["ratio"] for r in one["ratios"].values()) for shape, one in body["shapes"].items()}
    body["target"] = {"ratio": TARGET, "reached": best}
    found = ", ".join(f"{shape} {value:.2f}x" for shape, value in best.items())
    report.console().print(f"target: {TARGET}x; found {found}")
    report.save(NAME, options.quick, body)


if __name__ == "__main__":
    main()
