"""What ability fusion costs while generating: time with it over time without, by prompt and answer length.

``python benchmarks/fusion_cost.py [--quick] [--device cuda]``. Two more passes over the prompt and none while decoding,
so the ratio falls with the length of the answer. Variants take turns; a ratio is of the medians of rounds.
"""

from __future__ import annotations

import time
from typing import Any

import report
import torch
from measure import Timed, interleave
from shapes import SCENES, build

from opsin.algorithms.vift import AbilityFusion, Fusion
from opsin.data.prompts import prompt_batch, prompts_of, without_pictures
from opsin.data.scenes import sample

SHAPES = ("smollm2-135m", "toy")
PROMPTS, ANSWERS = (32, 256, 1024), (1, 16, 64)
ROWS = 4
WAYS = {"two passes": Fusion(strength=0.35), "one pass (ratio 0)": Fusion(strength=0.35, ratio=0.0)}


def inputs_of(built: Any, words: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prompts with a picture and so many words, and the same without the picture."""
    collator = built.collator(max_seq_len=4096)
    made = []
    for i in range(ROWS):
        stored = sample(SCENES, 3, "uniform", i, "vqa")
        question = " ".join(["large red cube"] * (words // 3 + 1))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "yes"}]
        made.append({**stored, "conversations": turns, "meta": {}})
    keys = ("input_ids", "attention_mask", "pixel_values")
    with_it = prompt_batch(collator, [prompts_of(collator.encoder, s)[0] for s in made])
    alone = prompt_batch(collator, [prompts_of(collator.encoder, without_pictures(s))[0] for s in made])
    return {k: with_it[k] for k in keys}, {k: alone[k] for k in keys[:2]}


def measured(built: Any, words: int, answer: int, options: Any) -> dict[str, Any]:
    """Plain and fused generation of one prompt and answer length."""
    device = torch.device(options.device)
    hf = built.hf.eval().to(device)
    inputs, text = ({k: v.to(device) for k, v in part.items()} for part in inputs_of(built, words))
    fusions = {name: AbilityFusion(hf, fusion) for name, fusion in WAYS.items()}

    def generate() -> None:
        hf.generate(**inputs, do_sample=False, max_new_tokens=answer, min_new_tokens=answer, pad_token_id=0)

    def timed(work: Any) -> Any:
        def run() -> Timed:
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            with torch.no_grad():
                work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return Timed([time.perf_counter() - began])

        return run

    def fused(fusion: AbilityFusion) -> Any:
        def work() -> None:
            with fusion.on(inputs, text):
                generate()

        return work

    variants = {"plain": timed(generate), **{name: timed(fused(f)) for name, f in fusions.items()}}
    rounds = options.rounds or (3 if options.quick else 9)
    series = interleave(variants, rounds=rounds, seconds=options.seconds or (15 if options.quick else 60))
    plain = series["plain"].median
    return {
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "text_tokens": int(text["input_ids"].shape[1]),
        "answer_tokens": answer,
        "ratio": {name: series[name].median / plain for name in WAYS},
        "times": {name: s.as_dict() for name, s in series.items()},
    }


def main() -> None:
    """Measure, print, save."""
    options = report.parser(__doc__, SHAPES).parse_args()
    report.quiet()
    body: dict[str, Any] = {"environment": report.environment(options.device), "rows": ROWS, "shapes": {}}
    for shape in options.shape or SHAPES:
        built = build(shape)
        found = [
            measured(built, words, answer, options)
            for words in (PROMPTS[:2] if options.quick else PROMPTS)
            for answer in (ANSWERS[:2] if options.quick else ANSWERS)
        ]
        body["shapes"][shape] = found
        rows = [
            (str(f["prompt_tokens"]), str(f["answer_tokens"]), f"{f['times']['plain']['median_s'] * 1000:,.0f}",
             *(f"{r:.2f}" for r in f["ratio"].values()))
            for f in found
        ]  # fmt: skip
        report.table(f"{shape}, {ROWS} rows", ("prompt tokens", "answer tokens", "plain ms", *WAYS), rows)
    report.save("fusion_cost", options.quick, body)


if __name__ == "__main__":
    main()
