"""Training step of Opsin against stock transformers: samples a second, and peak memory of a step.

Same weights, same batch (4 rows of 256 tokens, a picture each, 15 % labelled), same optimizer object. The
losses are compared before anything is timed. Memory is that of a second step: optimizer state exists before.

``--profile`` adds where the processor's time goes, by group of operators.
"""

from __future__ import annotations

import json
from typing import Any

import report

report.quiet()

from measure import Variant, agreeing, in_fresh_process, interleave, peak_of, ratio  # noqa: E402
from op_groups import profile  # noqa: E402
from shapes import SHAPES, Built, build, text_batch  # noqa: E402
from steps import adamw, composer_trainer, hf_trainer, loop, opsin_step, stock_step  # noqa: E402

from opsin.models.vlm import VisionLanguageModel  # noqa: E402

NAME = "step_speed"
VARIANTS = {
    "stock_loop": "plain loop, model(labels=...)",
    "opsin_loop": "plain loop, Opsin's net",
    "hf_trainer": "transformers.Trainer",
    "opsin_trainer": "composer.Trainer, Opsin's net",
}
PAIRS = (
    ("stock_loop", "opsin_loop"),
    ("hf_trainer", "opsin_trainer"),
    ("stock_loop", "opsin_trainer"),
    ("hf_trainer", "opsin_loop"),
)
TARGET_SPEED = 1.15


def variants(built: Built, device: str, names: list[str], burst: int) -> dict[str, Variant]:
    """Those of ``VARIANTS`` that can run here, all on one model and one optimizer."""
    batch = text_batch(built)
    optimizer = adamw(built.hf)
    made: dict[str, Variant | None] = {}
    # Wrapping puts a hook on the decoder, so it is left out where only stock variants run.
    model: Any = None
    if any(name.startswith("opsin") for name in names):
        model = VisionLanguageModel(built.hf, built.processor).train()
    for name in names:
        if name == "stock_loop":
            made[name] = loop(lambda: stock_step(built, optimizer, batch, device), burst, device)
        elif name == "opsin_loop":
            made[name] = loop(lambda: opsin_step(model, optimizer, batch, device), burst, device)
        elif name == "hf_trainer":
            made[name] = hf_trainer(built, optimizer, batch, burst, device)
        else:
            made[name] = composer_trainer(model, optimizer, batch, burst, device)
    return {name: variant for name, variant in made.items() if variant is not None}


def peak(shape: str, name: str, device: str) -> dict[str, float]:
    """Peak memory of the second step of one variant; called in a process that does nothing else."""
    built = build(shape, device)
    run = variants(built, device, [name], 1)[name]
    run()
    built.hf.zero_grad(set_to_none=True)
    return peak_of(run, device)


def speed(shape: str, options: Any) -> dict[str, Any]:
    """Times and peaks of all variants of one shape."""
    device = options.device
    built = build(shape, device)
    runs = variants(built, device, list(VARIANTS), built.burst)
    losses = {name: run().loss for name, run in runs.items()}
    agreeing(losses)
    rounds = options.rounds or (2 if options.quick else 15)
    seconds = options.seconds or (60.0 if built.burst == 1 else 10.0)
    series = interleave(runs, rounds=rounds, seconds=seconds, warmup=0, least=2 if options.quick else 3)
    batch = text_batch(built)
    body = {
        "loss": losses,
        "rows": int(batch["input_ids"].shape[0]),
        "tokens_a_row": int(batch["input_ids"].shape[1]),
        "labelled_share": float((batch["labels"] != -100).float().mean()),
        "vocabulary": built.vocabulary,
        "variants": {name: one.as_dict() for name, one in series.items()},
        "ratios": {
            f"{fast} over {slow}": ratio(series[slow], series[fast])
            for slow, fast in PAIRS
            if slow in series and fast in series
        },
    }
    # Each process takes many seconds, and a trainer's step needs what its loop needs.
    measured = list(VARIANTS) if options.all_peaks else ["stock_loop", "opsin_loop"]
    for name, one in body["variants"].items():
        one["samples_per_s"] = body["rows"] / one["median_s"]
        if name in measured:
            arguments = ["--peak", name, "--shape", shape, "--device", options.device]
            one["memory"] = in_fresh_process(__file__, arguments)
    stock, ours = (body["variants"][n]["memory"]["step_MiB"] for n in ("stock_loop", "opsin_loop"))
    body["memory_ratio"] = stock / ours
    if options.profile:
        optimizer = adamw(built.hf)
        model = VisionLanguageModel(built.hf, built.processor).train()
        steps = {
            "stock": lambda: stock_step(built, optimizer, batch, device),
            "opsin": lambda: opsin_step(model, optimizer, batch, device),
        }
        text, body["profile_ms"] = profile(steps, built.vocabulary, device)
        report.path_of(f"{NAME}.{shape}.profile", options.quick, ".txt").write_text(text, encoding="utf-8")
        print(text)
    return body


def show(shape: str, body: dict[str, Any]) -> None:
    """Tables of one shape."""
    rows = []
    for name, one in body["variants"].items():
        low, high = one["quartiles_s"]
        rows.append(
            (
                VARIANTS[name],
                f"{1e3 * one['median_s']:.1f}",
                f"{1e3 * low:.1f} .. {1e3 * high:.1f}",
                f"{one['samples_per_s']:.2f}",
                *(f"{one['memory'][key]:.0f}" if "memory" in one else "" for key in ("step_MiB", "peak_MiB")),
            )
        )
    title = f"{shape}: {body['rows']} x {body['tokens_a_row']} tokens, {body['labelled_share']:.0%} labelled, {body['vocabulary']:,} words"
    columns = ("step", "ms", "quartiles", "samples/s", "memory of the step, MiB", "of the process")
    report.table(title, columns, rows)
    ratios = [(name, report.spread(found)) for name, found in body["ratios"].items()]
    ratios.append(("memory of the step, stock_loop over opsin_loop", f"{body['memory_ratio']:.2f}"))
    report.table("how many times faster (quartiles of rounds)", ("pair", "ratio"), ratios)
    if "hf_trainer" not in body["variants"]:
        report.console().print("transformers.Trainer was left out: accelerate is not installed")


def main() -> None:
    """Measure all shapes that were asked for."""
    parser = report.parser(__doc__, SHAPES)
    parser.add_argument("--profile", action="store_true", help="where the time goes, by group of operators")
    parser.add_argument("--all-peaks", action="store_true", help="memory of the trainers, too")
    parser.add_argument("--peak", choices=VARIANTS, help="only this variant's peak memory, as JSON")
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.shape[0], options.peak, options.device)))
        return
    body: dict[str, Any] = {"environment": report.environment(options.device), "shapes": {}}
    for shape in options.shape or SHAPES:
        body["shapes"][shape] = speed(shape, options)
        show(shape, body["shapes"][shape])
    if "smollm2-135m" in body["shapes"]:
        one = body["shapes"]["smollm2-135m"]
        reached = one["ratios"]["opsin_loop over stock_loop"]["ratio"]
        body["target"] = {"speed": TARGET_SPEED, "reached": reached, "less_memory": one["memory_ratio"] > 1}
        report.console().print(
            f"target at smollm2-135m: {TARGET_SPEED}x and less memory; found {reached:.2f}x, 1/{one['memory_ratio']:.2f}"
        )
    report.save(NAME, options.quick, body)


if __name__ == "__main__":
    main()
