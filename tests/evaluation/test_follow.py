"""Suites that follow the right answer word by word say what free answers say, with one pass a picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opsin.algorithms.vift import Fusion
from opsin.data.collate import VLMCollator
from opsin.data.loader import build_encoder
from opsin.evaluation.adapter import VLMAdapter
from opsin.evaluation.asking import ask_suite, together
from opsin.evaluation.benchmarks.own_scenes import scenes
from opsin.models.errors import UserError
from opsin.models.vlm import VisionLanguageModel
from opsin.training.models import scenes_llava

ASKED: dict[str, Any] = {
    "split": ["aligned", "conflict"], "samples": 10, "seed": 5, "objects": [2, 3], "charts": 0, "sign": 0, "max_new_tokens": 4,
}  # fmt: skip
MANY: dict[str, Any] = {
    **ASKED,
    "split": "uniform",
    "questions": 4,
    "kinds": ["colour", "size", "exists", "count"],
}


@pytest.fixture(scope="module")
def asked() -> VLMAdapter:
    """The shipped parts with a projector that knows nothing: it answers by habit, in the words that it has read."""
    model = scenes_llava(seed=3)
    encoder = build_encoder(
        model.processor, model.hf.config, template="vicuna_v1", system_prompt="", max_seq_len=512
    )
    return VLMAdapter(model, VLMCollator(encoder), batch_size=8)


@pytest.mark.parametrize("how", [ASKED, MANY, {**MANY, "stream": "text"}], ids=["one", "many", "text"])
def test_outputs_and_scores_are_those_of_greedy_answers(asked: VLMAdapter, how: dict[str, Any]) -> None:
    free, followed = (scenes(mode=mode, **how) for mode in ("generate", "follow"))
    items = free.load()
    said, led = (ask_suite(asked, "scenes", suite, items) for suite in (free, followed))
    assert [r["right"] for r in said.records] == [r["right"] for r in led.records]
    assert said.scores.measures == led.scores.measures
    first = [[r["output"].split()[:1] for r in one.records] for one in (said, led)]
    assert first[0] == first[1]
    assert len({r["output"] for r in led.records}) > 1


@pytest.mark.parametrize("way", ["bidirectional", "fused"])
def test_also_where_images_see_themselves_or_abilities_are_fused(asked: VLMAdapter, way: str) -> None:
    model = VisionLanguageModel(
        asked.model.hf, asked.model.processor, bidirectional_images=way == "bidirectional"
    )
    fusion = Fusion(strength=0.7) if way == "fused" else None
    other = VLMAdapter(model, asked.collator, batch_size=8, fusion=fusion)
    free, followed = (scenes(mode=mode, **MANY) for mode in ("generate", "follow"))
    items = free.load()
    said, led = (ask_suite(other, "scenes", suite, items) for suite in (free, followed))
    assert [r["right"] for r in said.records] == [r["right"] for r in led.records]
    assert {r["right"] for r in led.records} == {True, False}
    first = [[r["output"].split()[:1] for r in one.records] for one in (said, led)]
    assert first[0] == first[1]
    plain = ask_suite(asked, "scenes", followed, items)
    assert any(abs(a["nll"] - b["nll"]) > 1e-4 for a, b in zip(plain.records, led.records, strict=True))


def test_the_likelihood_is_that_of_the_right_answer_alone(asked: VLMAdapter) -> None:
    suite = scenes(mode="follow", **MANY)
    items = suite.load()
    found = ask_suite(asked, "scenes", suite, items).records
    alone = [asked.answer_logprobs([item.stored()])[0][0][0] for item in items]
    for record, one in zip(found, alone, strict=True):
        assert record["nll"] == pytest.approx(-one.sum, abs=1e-4)
        assert record["right"] == one.exact


def test_questions_of_a_picture_share_a_row_and_keep_their_order(
    asked: VLMAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = scenes(mode="follow", **MANY)
    items = suite.load()
    joined = together([item.stored() for item in items])
    pictures = len({item.id.rpartition("/")[0] for item in items})
    assert len(joined) == pictures < len(items)
    passes: list[int] = []
    forward = asked.model.net.forward

    def counted(batch: Any, step: Any) -> Any:
        passes.append(len(batch["input_ids"]))
        return forward(batch, step)

    monkeypatch.setattr(asked.model.net, "forward", counted)
    records = ask_suite(asked, "scenes", suite, items).records
    assert [r["id"] for r in records] == [item.id for item in items]
    assert sum(passes) <= pictures + len(items) // asked.batch_size + 1


def test_other_pictures_systems_and_words_before_them_stay_apart() -> None:
    def one(value: str, images: bytes = b"a", system: str | None = None) -> dict[str, Any]:
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "yes"}]
        turns = [{"from": "system", "value": system}, *turns] if system else turns
        return {
            "id": "x",
            "conversations": turns,
            "images": images,
            "meta": {"kinds": ["all"], "turns": "independent"},
        }

    pair = together([one("<image>\nA?"), one("<image>\nB?")])
    assert [t["value"] for t in pair[0]["conversations"]] == ["<image>\nA?", "yes", "B?", "yes"] and len(
        pair
    ) == 1
    assert pair[0]["meta"]["kinds"] == ["all", "all"]
    for other in (one("<image>\nB?", b"b"), one("<image>\nB?", system="s"), one("B? <image>"), one("B?", b""), one("<image>\n<image>\nB?")):  # fmt: skip
        assert len(together([one("<image>\nA?"), other])) == 2
        assert len(together([other, one("<image>\nA?")])) == 2


def test_a_beginning_of_each_suite_is_asked_blind(asked: VLMAdapter) -> None:
    suite = scenes(mode="follow", **ASKED)
    items = suite.load()
    some = ask_suite(asked, "scenes", suite, items, blind=True, blind_limit=6)
    assert some.blind is not None and some.blind.measures["accuracy"].n == 6
    with torch.no_grad():
        whole = ask_suite(asked, "scenes", suite, items, blind=True)
    assert whole.blind is not None and whole.blind.measures["accuracy"].n == len(items)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"stream": "caption"}, r"mode: follow: scorer 'scene_captions' reads whole sentences.*use generate"),
        (
            {"split": "exists_random"},
            r"mode: follow: splits exists_\.\.\. are read as POPE reads sentences; use generate",
        ),
        ({"scorer": "letter"}, r"mode: follow: scorer 'letter' reads whole sentences"),
    ],
)
def test_what_reads_sentences_refuses_it(how: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        scenes(mode="follow", samples=4, **how)
