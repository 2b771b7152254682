"""Visual Contribution: three terms and a control, beside accuracy, with errors that know what hangs together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.data.prompts import without_pictures
from opsin.data.schema import pack_images
from opsin.evaluation.adapter import VLMAdapter
from opsin.evaluation.blind import with_blank_pictures, with_other_pictures
from opsin.evaluation.scorers.base import mean
from opsin.evaluation.stored_answers import clustered
from opsin.evaluation.visual_contribution import CONDITIONS, VisualContribution, visual_contribution
from opsin.models.errors import UserError
from opsin.models.vlm import VisionLanguageModel

import zoo
from adapters import FAMILIES, STRONG, adapter, broken_sample, collator


def kinds(sample: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**sample, "meta": {**sample["meta"], "kinds": list(names)}}


def samples() -> list[dict[str, Any]]:
    """Four pictures of one size, one of them twice, two in one sample; and some that show nothing or are broken."""
    twin = {**zoo.sample(4), "images": zoo.sample(1)["images"]}
    return [
        kinds(zoo.sample(1), "colour"),
        zoo.sample(6, images=0),
        kinds(zoo.sample(2, turns=3, independent=True), "colour", "size", "colour"),
        kinds(twin, "size"),
        broken_sample(),
        kinds(zoo.sample(3, turns=2), "size", "size"),
        kinds(zoo.sample(5, images=2), "size"),  # nobody else has two pictures
    ]


def blind_model(family: str) -> VisionLanguageModel:
    """A model for which every picture is the same."""
    built = zoo.build(family)
    last = built.hf.model.visual.merger.mlp[-1] if family == "qwen2_5_vl" else built.hf.model.multi_modal_projector.linear_2  # fmt: skip
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    return VisionLanguageModel(built.hf, built.processor)


@FAMILIES
def test_terms_are_the_answers_log_likelihoods_under_each_picture(family: str) -> None:
    one, told = adapter(family, batch_size=4), []
    result = visual_contribution(one, samples(), progress=lambda *now: told.append(now))
    assert result.skipped == {"no_picture": 1, "unreadable_image": 1}
    assert [(q.id, q.turn, q.kind) for q in result.questions] == [
        ("zoo/1", 0, "colour"), ("zoo/2", 0, "colour"), ("zoo/2", 1, "size"), ("zoo/2", 2, "colour"),
        ("zoo/4", 0, "size"), ("zoo/3", 0, "size"), ("zoo/3", 1, "size"), ("zoo/5", 0, "size"),
    ]  # fmt: skip
    used = [s for i, s in enumerate(samples()) if i not in (1, 4)]
    changed = {
        "image": used,
        "other": with_other_pictures(used),
        "grey": with_blank_pictures(used),
        "removed": [without_pictures(s) for s in used],
    }
    for condition, given in changed.items():
        by_hand = [e[0] for s in one.answer_logprobs(given) for e in s]
        found = [q.found[condition] for q in result.questions if condition in q.found]
        assert np.allclose([f.sum for f in found], [b.sum for b in by_hand], atol=2e-5)
    assert [q.id for q in result.questions if "other" not in q.found] == ["zoo/5"]
    assert {name for name, _, _ in told} == set(CONDITIONS) and told[-1] == ("removed", 2, 2)
    gains = [q.contribution("removed") for q in result.questions]
    assert gains == [q.found["image"].sum - q.found["removed"].sum for q in result.questions]
    assert len({round(g, 3) for g in gains}) == len(gains)
    # Two samples about one picture count as one when errors are made.
    measured = result.measures()
    assert measured["vc/removed"].value == pytest.approx(np.mean(gains)) and measured["vc/removed"].n == 8
    centred = np.array(gains) - np.mean(gains)
    pictures = [0, 1, 1, 1, 0, 2, 2, 3]
    squares = sum(centred[[p == k for p in pictures]].sum() ** 2 for k in range(4))
    assert measured["vc/removed"].standard_error == pytest.approx(math.sqrt(squares * 4 / 3) / 8)
    assert measured["vc/other"].n == 7 and result.measures("colour")["vc/removed"].n == 3
    assert measured["vc/other"].unit == measured["nats/image"].unit == "nats"


@FAMILIES
def test_a_model_that_ignores_pictures_has_no_visual_contribution(family: str) -> None:
    blind = VLMAdapter(blind_model(family), collator(family), batch_size=3)
    asked = [zoo.sample(i, turns=1 + i % 2, independent=True) for i in range(5)]
    result = visual_contribution(blind, asked)
    for question in result.questions:
        assert question.found["image"] == question.found["other"] == question.found["grey"]
    measured = result.measures()
    for control in ("other", "grey"):
        assert measured[f"vc/{control}"].value == 0 == measured[f"vc/{control}"].standard_error
    # Removing it still changes the prompt, which is why this control says least.
    assert abs(measured["vc/removed"].value or 0.0) > 1e-4
    seeing = visual_contribution(adapter(family), asked).measures()
    assert abs(seeing["vc/other"].value or 0.0) > 1e-3


def test_accuracy_is_the_share_of_answers_that_it_would_give() -> None:
    one, tokenizer = adapter("llava"), zoo.tokenizer()
    asked = [zoo.sample(i) for i in range(4)]
    for stored, answer in zip(asked, ("red", "no", "red", "red"), strict=True):
        stored["conversations"][1]["value"] = answer
    (red,), end = tokenizer(" red")["input_ids"], tokenizer.eos_token_id
    assert len(tokenizer(" no")["input_ids"]) == 1

    def say_red(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.zeros_like(logits)
        forced[::2, red], forced[1::2, end] = 9.0, 9.0  # two labels an answer: the word and its end
        return forced

    handle = one.model.hf.get_submodule(one.model.anatomy.lm_head).register_forward_hook(say_red)
    try:
        result = visual_contribution(one, asked)
    finally:
        handle.remove()
    assert [q.found["image"].exact for q in result.questions] == [True, False, True, True]
    measured = result.measures()
    assert measured["accuracy/image"].as_dict() == pytest.approx(
        {"value": 0.75, "n": 4, "standard_error": 0.25, "unit": "share"}
    )
    assert measured["vc/other"].value == pytest.approx(0.0, abs=1e-6)


def test_fusion_is_measured_as_it_answers() -> None:
    asked = [zoo.sample(i) for i in range(3)]
    fused, plain = (
        visual_contribution(a, asked) for a in (adapter("llava", fusion=STRONG), adapter("llava"))
    )
    for one, other in zip(fused.questions, plain.questions, strict=True):
        assert abs(one.found["image"].sum - other.found["image"].sum) > 1e-4
        # With its picture removed there is nothing to fuse.
        assert one.found["removed"].sum == pytest.approx(other.found["removed"].sum, abs=2e-5)


def test_clusters_of_one_are_ordinary_errors_and_one_cluster_has_none() -> None:
    values = [0.5, -1.0, 2.0, 3.5]
    ordinary = mean(values, "nats")
    assert clustered(values, "abcd", "nats").as_dict() == pytest.approx(ordinary.as_dict())
    assert clustered([1.0, 1.0, 3.0, 3.0], "aabb").standard_error == pytest.approx(
        1.0
    )  # two values, not four
    assert clustered(values, "aaaa").standard_error is None and clustered([], []).value is None


def test_numbers_and_chart_are_written(tmp_path: Path) -> None:
    result = visual_contribution(adapter("llava"), samples())
    found = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert found["questions"] == 8 and found["pictures"] == 4 and set(found["by_kind"]) == {"colour", "size"}
    names = {f"{row}/{c}" for row in ("accuracy", "nats") for c in CONDITIONS} | {
        f"vc/{c}" for c in CONDITIONS[1:]
    }
    assert set(found["measures"]) == names
    with Image.open(result.picture(tmp_path / "new" / "vc.png")) as chart:
        pixels = np.asarray(chart.convert("RGB")).astype(int)
    assert chart.format == "PNG" and pixels.shape[1] > 800
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):
        assert (np.abs(pixels - colour).sum(-1) < 30).sum() > 50  # every condition is drawn
    unnamed = VisualContribution(tuple(q for q in result.questions[:1]))
    assert unnamed.picture(tmp_path / "one.png").is_file()


def test_nothing_to_measure_is_one_line() -> None:
    with pytest.raises(UserError, match="none of 2 samples has a picture and can be used"):
        visual_contribution(adapter("llava"), [zoo.sample(1, images=0), broken_sample()])
    torn = {**zoo.sample(2), "images": b"\x01"}
    nothing = {**zoo.sample(3), "conversations": None}
    wrong = kinds(zoo.sample(4, turns=2), "colour")
    long = zoo.sample(5)
    long["conversations"][0]["value"] += " why" * 600
    empty = {**zoo.sample(7), "images": pack_images([])}
    result = visual_contribution(adapter("llava"), [torn, nothing, wrong, long, empty, zoo.sample(6)])
    assert result.skipped == {"unreadable_image": 1, "bad_conversation": 2, "too_long": 1, "no_picture": 1}
    assert set(result.questions[0].found) == {"image", "grey", "removed"}
    assert result.measures()["vc/other"].value is None and result.as_dict()["measures"]["vc/other"]["n"] == 0
