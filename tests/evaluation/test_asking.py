"""Suites asked: whose pictures a blind question gets, and answers that are no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from opsin.data.schema import IMAGE_MARK
from opsin.evaluation.adapter import VLMAdapter
from opsin.evaluation.asking import ask_suite, with_others_pictures
from opsin.evaluation.benchmarks import scenes
from opsin.evaluation.records import Item, read_predictions, write_predictions
from opsin.evaluation.scorers import make
from opsin.evaluation.suites import Suite
from opsin.models.vlm import VisionLanguageModel

import adapters
import zoo


def about(name: str, *pictures: int) -> Item:
    shown = tuple(partial(zoo.picture, number) for number in pictures)
    return Item(name, f"{IMAGE_MARK}\n" * len(shown) + "Is it red?", shown, "yes", choices=("yes", "no"))


def seen(items: Sequence[Item]) -> list[tuple[str, list[bytes]]]:
    return [(item.id, [read() for read in item.pictures]) for item in items]


def test_a_blind_question_gets_other_pictures_and_as_many() -> None:
    items = [about("a", 0), about("same", 0), about("b", 1), about("two", 0, 1), about("none"), about("c", 2)]
    expected = [("a", [1]), ("same", [1]), ("b", [2]), ("c", [0])]
    assert seen(with_others_pictures(items)) == [(n, [zoo.picture(i) for i in p]) for n, p in expected]
    assert with_others_pictures([about("a", 0), about("same", 0)]) == []


def test_a_blind_question_never_gets_its_twins_picture() -> None:
    """The twin's picture says that the other answer is right: who looks would score below who guesses."""
    options = {"objects": [1, 2], "charts": 0, "sign": 0, "samples": 12}
    pairs = list(scenes(split="minimal_pairs", **options).load())
    twins = list(scenes(split=["aligned", "conflict"], **options).load())
    for items, scene in (
        (pairs, lambda item: item.meta["pair"]),
        (twins, lambda item: item.id.replace("aligned", "conflict").rpartition("/")[0]),
    ):
        own = {item.id: scene(item) for item in items}
        of = {read(): scene(item) for item in items for read in item.pictures}
        blind = with_others_pictures(items)
        assert len(blind) == len(items) and len(set(own.values())) >= 6
        assert all(of[item.pictures[0]()] != own[item.id] for item in blind)


def test_log_likelihoods_that_are_no_numbers_are_errors_and_the_rest_is_kept(tmp_path: Path) -> None:
    built = zoo.build("llava")
    with torch.no_grad():
        built.hf.get_output_embeddings().weight.fill_(float("nan"))
    broken = VisionLanguageModel(built.hf, built.processor)
    adapter = VLMAdapter(broken, adapters.collator("llava"), batch_size=2)
    items = [about("a", 0), about("b", 1), about("c", 2)]
    asked = ask_suite(adapter, "pope", Suite("hallucination", make("pope"), lambda: items, "rank"), items)
    assert asked.errors == 3 and all("not numbers" in r["error"] for r in asked.records)
    assert asked.scores.measures["accuracy"].value == 0 and asked.scores.measures["unparsed"].value == 1
    write_predictions(tmp_path / "p.jsonl", asked.records)
    assert [r["id"] for r in read_predictions(tmp_path / "p.jsonl")] == ["a", "b", "c"]
