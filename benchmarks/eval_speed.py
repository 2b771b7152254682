"""How fast a model is asked: generation in batches, and log-likelihoods of choices that share their prompt.

``python benchmarks/eval_speed.py [--quick] [--device cuda]``. Two tables a shape. *Generation*: questions about pictures,
answers of a fixed number of tokens, so many prompts a call; pictures are decoded within the time. *Ranking*: K choices of
each question, (a) as branches of one row with prompt and picture run once, (b) a row a choice in batches, (c) a row a
choice, one at a time. All ways take turns and have to agree. What a branch saves grows with K and with the prompt; where
most of the time is the tower or the prompt, (a) costs about one row whatever K is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import report
import torch
from measure import Series, Timed, interleave, ratio, synchronise
from shapes import SCENES, Built, build

from opsin.data.prompts import prompts_of
from opsin.data.scenes import sample
from opsin.evaluation.adapter import VLMAdapter
from opsin.models.vlm import VisionLanguageModel

SHAPES = ("smollm2-135m", "toy")
QUESTIONS = 16
FEWER = 4
"""Questions that are ranked where a row a choice would take minutes a round."""
BATCHES = (1, 4, 16)
ANSWERS = (1, 16)
CHOICES = (4, 16)
WORDS = (16, 256)
"""Words of a question: a short one about a scene, and one with a long instruction or options."""
RANKING = 16
"""Rows a call while ranking in batches."""
WAYS = {
    "branches": {"batch_size": RANKING},
    "row a choice": {"batch_size": RANKING, "share": "nothing"},
    "one by one": {"batch_size": 1, "share": "nothing"},
}


def asked(count: int, words: int) -> list[dict[str, Any]]:
    """Questions of one exchange with about so many words and a picture of their own."""
    found = []
    for i in range(count):
        stored = sample(SCENES, 3, "uniform", i, "vqa")
        question = " ".join(["large red cube"] * (words // 3 + i % 3))  # not all of one length
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "yes"}]
        found.append({**stored, "conversations": turns, "meta": {}})
    return found


def choices(count: int) -> list[str]:
    """Different answers of two words."""
    colours, shapes = ("red", "green", "blue", "yellow"), ("cube", "sphere", "cylinder", "cone")
    return [f"{a} {b}" for a in colours for b in shapes][:count]


def timed(work: Callable[[], Any], device: str) -> Callable[[], Timed]:
    """A variant that runs ``work`` once."""

    def run() -> Timed:
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        return Timed([time.perf_counter() - began])

    return run


def taking_turns(variants: dict[str, Callable[[], Any]], options: Any) -> dict[str, Series]:
    """Times of all variants."""
    rounds = options.rounds or (2 if options.quick else 7)
    seconds = options.seconds or (10 if options.quick else 90)
    runs = {name: timed(work, options.device) for name, work in variants.items()}
    return interleave(runs, rounds=rounds, seconds=seconds, least=2)


def generation(built: Built, model: VisionLanguageModel, answer: int, options: Any) -> dict[str, Any]:
    """Questions a second by prompts a call."""
    samples = asked(QUESTIONS, WORDS[0])
    collator = built.collator()
    adapters = {str(size): VLMAdapter(model, collator, batch_size=size) for size in BATCHES}
    fixed = {"max_new_tokens": answer, "min_new_tokens": answer}
    said = {size: adapter.generate(samples, **fixed) for size, adapter in adapters.items()}
    if any(texts != said["1"] for texts in said.values()):
        print(f"{built.name}: answers of batches differ from one by one (rounding of another batch size)")
    series = taking_turns(
        {k: (lambda a=a: a.generate(samples, **fixed)) for k, a in adapters.items()}, options
    )
    return {
        "answer_tokens": answer,
        "questions": QUESTIONS,
        "prompt_tokens": len(prompts_of(collator.encoder, samples[0])[0].document),
        "same_answers": sum(a == b for a, b in zip(said["1"], said[str(BATCHES[-1])], strict=True)),
        "questions_a_second": {size: QUESTIONS / one.median for size, one in series.items()},
        "against_one_by_one": {size: ratio(series["1"], one) for size, one in series.items()},
        "times": {size: one.as_dict() for size, one in series.items()},
    }


def ranking(built: Built, model: VisionLanguageModel, count: int, words: int, options: Any) -> dict[str, Any]:
    """Questions a second by how their choices are laid out."""
    slow = built.name != "toy" and options.device == "cpu"
    questions = FEWER if slow or options.quick else QUESTIONS
    samples, collator = asked(questions, words), built.collator()
    given = [[choices(count)]] * questions
    adapters = {name: VLMAdapter(model, collator, **way) for name, way in WAYS.items()}
    nats = {
        name: torch.tensor([[one.sum for one in e[0]] for e in adapter.answer_logprobs(samples, given)])
        for name, adapter in adapters.items()
    }
    apart = max(float((found - nats["one by one"]).abs().max()) for found in nats.values())
    if not apart < (1e-3 if options.device == "cpu" else 1e-2):
        raise SystemExit(f"{built.name}: log-likelihoods differ by {apart} nats between the ways")
    series = taking_turns(
        {name: (lambda a=a: a.answer_logprobs(samples, given)) for name, a in adapters.items()}, options
    )
    return {
        "choices": count,
        "prompt_tokens": len(prompts_of(collator.encoder, samples[0])[0].document),
        "questions": questions,
        "largest_difference_nats": apart,
        "questions_a_second": {name: questions / one.median for name, one in series.items()},
        "against_one_by_one": {name: ratio(series["one by one"], one) for name, one in series.items()},
        "branches_against_rows": ratio(series["row a choice"], series["branches"]),
        "times": {name: one.as_dict() for name, one in series.items()},
    }


def main() -> None:
    """Measure, print, save."""
    options = report.parser(__doc__, SHAPES).parse_args()
    report.quiet()
    body: dict[str, Any] = {"environment": report.environment(options.device), "shapes": {}}
    for shape in options.shape or (SHAPES[1:] if options.quick else SHAPES):
        built = build(shape, options.device)
        model = VisionLanguageModel(built.hf, built.processor)
        answers = ANSWERS if not options.quick else ANSWERS[1:]
        counts = (
            [(k, w) for w in WORDS for k in CHOICES] if not options.quick else [(4, WORDS[0]), (16, WORDS[1])]
        )
        said = [generation(built, model, answer, options) for answer in answers]
        ranked = [ranking(built, model, count, words, options) for count, words in counts]
        body["shapes"][shape] = {"generation": said, "ranking": ranked}
        rows = [
            (f["answer_tokens"], f["prompt_tokens"], *(f"{v:,.1f}" for v in f["questions_a_second"].values()),
             *(report.spread(f["against_one_by_one"][str(size)]) for size in BATCHES[1:]))
            for f in said
        ]  # fmt: skip
        report.table(
            f"{shape}: generation, questions a second by prompts a call, and times one by one",
            (
                "answer tokens",
                "prompt tokens",
                *(f"batch {b}" for b in BATCHES),
                *(f"{b} : 1" for b in BATCHES[1:]),
            ),
            rows,
        )
        rows = [
            (f["choices"], f["prompt_tokens"], *(f"{v:,.1f}" for v in f["questions_a_second"].values()),
             report.spread(f["branches_against_rows"]), report.spread(f["against_one_by_one"]["branches"]))
            for f in ranked
        ]  # fmt: skip
        report.table(
            f"{shape}: ranking, questions a second",
            ("choices", "prompt tokens", *WAYS, "branches : rows", "branches : one by one"),
            rows,
        )
    report.save("eval_speed", options.quick, body)


if __name__ == "__main__":
    main()
