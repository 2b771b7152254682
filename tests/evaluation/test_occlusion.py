"""Occlusion: holes over what is asked about and elsewhere, and what they cost the answer."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opsin.data.scenes import SceneConfig, sample
from opsin.data.schema import pack_images, unpack_images
from opsin.evaluation.adapter import VLMAdapter
from opsin.evaluation.holes import area, covered, groups, painted, places_elsewhere
from opsin.evaluation.occlusion import PICTURES, Occlusion, occlusion
from opsin.models.errors import UserError
from opsin.models.vlm import VisionLanguageModel

import zoo
from adapters import FAMILIES, adapter, collator

CONFIG = SceneConfig(
    size=64, objects=(1, 3), sign=0, charts=0, questions=3, kinds=("colour", "size", "comparison")
)


@lru_cache
def scenes() -> tuple[dict[str, Any], ...]:
    return tuple(sample(CONFIG, 5, "uniform", i) for i in range(6))


def pixels(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_elsewhere_is_as_large_inside_and_apart() -> None:
    rng = np.random.default_rng(0)
    placed = 0
    for number in range(200):
        size = tuple(int(v) for v in rng.integers(20, 50, 2))
        boxes = []
        for _ in range(int(rng.integers(1, 4))):
            w, h = (int(v) for v in rng.integers(2, 14, 2))
            left, top = int(rng.integers(0, size[0] - w + 1)), int(rng.integers(0, size[1] - h + 1))
            boxes.append((left, top, left + w, top + h))
        moved = places_elsewhere(boxes, size, ("id", number))
        assert moved == places_elsewhere(boxes, size, ("id", number))
        if moved is None:
            continue
        placed += 1
        assert all(0 <= a < c <= size[0] and 0 <= b < d <= size[1] for a, b, c, d in moved)
        assert not (covered(boxes, size) & covered(moved, size)).any()
        assert area(boxes) == area(moved)
        assert sorted((c - a, d - b) for a, b, c, d in boxes) == sorted(
            (c - a, d - b) for a, b, c, d in moved
        )
    assert placed > 150
    choices = {places_elsewhere([(0, 0, 4, 4)], (40, 40), (str(i), 0)) for i in range(200)}
    assert len(choices) > 150  # all over the picture
    assert places_elsewhere([(0, 0, 6, 10)], (10, 10), ("id", 0)) is None
    assert places_elsewhere([(0, 0, 5, 10)], (10, 10), ("id", 0)) == ((5, 0, 10, 10),)


def test_boxes_that_overlap_are_one_hole() -> None:
    a, b, c, d = (0, 0, 4, 4), (3, 3, 8, 8), (20, 20, 22, 22), (8, 2, 10, 9)
    assert [sorted(g) for g in groups([a, c, b])] == [[c], [a, b]]
    assert [sorted(g) for g in groups([a, d, b])] == [[a, b, d]]  # through b, which both meet
    moved = places_elsewhere([a, b], (40, 40), ("id", 0))
    assert moved is not None and area(moved) == 16 + 25 - 1


def test_only_the_hole_is_painted_in_the_colour_around_it() -> None:
    plain = np.zeros((30, 40, 3), np.uint8)
    plain[:, :20], plain[:, 20:] = (200, 40, 10), (10, 60, 250)
    plain[10:14, 5:9] = (255, 255, 255)
    buffer = io.BytesIO()
    Image.fromarray(plain).save(buffer, "PNG")
    boxes = [(5, 10, 9, 14), (18, 0, 22, 30)]
    done = pixels(painted(buffer.getvalue(), boxes))
    assert (done[10:14, 5:9] == (200, 40, 10)).all() and (done[:, 18:22] == (105, 50, 130)).all()
    untouched = ~covered(boxes, (40, 30))
    assert (done[untouched] == plain[untouched]).all()
    assert (pixels(painted(buffer.getvalue(), boxes, "grey"))[:, 18:22] == 128).all()
    whole = pixels(painted(buffer.getvalue(), [(0, 0, 40, 30)]))
    assert (whole == np.rint(plain.reshape(-1, 3).mean(0))).all()


@FAMILIES
def test_changes_are_those_of_the_answers_log_likelihood(family: str) -> None:
    one, told = adapter(family, batch_size=4), []
    result = occlusion(one, scenes(), progress=lambda *now: told.append(now))
    asked = sum(bool(a) for s in scenes() for a in s["meta"]["asked"])
    assert len(result.questions) + result.skipped.get("no_room", 0) == asked > 8
    by_id = {s["id"]: s for s in scenes()}
    for question in result.questions:
        stored = by_id[question.id]
        objects = stored["meta"]["objects"]
        boxes = tuple(dict.fromkeys(tuple(objects[i]["box"]) for i in stored["meta"]["asked"][question.turn]))
        assert question.objects == boxes and question.kind == stored["meta"]["kinds"][question.turn]
        assert question.share == area(boxes) / 64**2 == area(question.elsewhere) / 64**2
    for question in result.questions[::4]:
        stored, found = by_id[question.id], []
        for holes in ((), question.objects, question.elsewhere):
            picture = unpack_images(stored["images"])[0]
            images = pack_images([painted(picture, holes) if holes else picture])
            found.append(one.answer_logprobs([{**stored, "images": images}])[0][question.turn][0].sum)
        assert [question.found[p].sum for p in PICTURES] == pytest.approx(found, abs=2e-5)
        assert question.change("object") == pytest.approx(found[1] - found[0], abs=4e-5)
    measured = result.measures()
    difference = [q.change("object") - q.change("elsewhere") for q in result.questions]
    assert measured["difference"].value == pytest.approx(np.mean(difference)) and np.ptp(difference) > 1e-3
    assert measured["difference"].value == pytest.approx(
        (measured["change/object"].value or 0) - (measured["change/elsewhere"].value or 0)
    )
    assert {name for name, _, _ in told} == set(PICTURES)
    assert sum(result.measures(kind)["difference"].n for kind in ("colour", "size", "comparison")) == len(
        difference
    )


def test_a_model_that_ignores_pictures_loses_nothing_by_holes() -> None:
    built = zoo.build("llava")
    with torch.no_grad():
        built.hf.model.multi_modal_projector.linear_2.weight.zero_()
    result = occlusion(VLMAdapter(VisionLanguageModel(built.hf), collator("llava"), batch_size=3), scenes())
    assert all(q.found["picture"] == q.found["object"] == q.found["elsewhere"] for q in result.questions)
    for name in ("change/object", "change/elsewhere", "difference"):
        assert result.measures()[name].value == 0 == result.measures()[name].standard_error


def test_questions_asked_one_by_one_give_the_same_as_a_whole_sample() -> None:
    """The form in which a suite's items come: one exchange each."""
    singles = []
    for stored in scenes():
        for turn, answer in enumerate(stored["conversations"][1::2]):
            question = stored["conversations"][2 * turn]["value"]
            if turn:
                question = f"<image>\n{question}"
            meta = {k: [stored["meta"][k][turn]] for k in ("kinds", "asked")}
            turns = [{"from": "human", "value": question}, answer]
            singles.append({**stored, "conversations": turns, "meta": {**stored["meta"], **meta}})
    whole, apart = occlusion(adapter("llava"), scenes()), occlusion(adapter("llava"), singles)
    assert [q.id for q in whole.questions] == [q.id for q in apart.questions]
    for one, other in zip(whole.questions, apart.questions, strict=True):
        assert one.objects == other.objects and one.picture == other.picture
        assert one.change("object") == pytest.approx(other.change("object"), abs=4e-5)
    # Elsewhere is drawn by sample and exchange.
    assert [q.elsewhere for q in whole.questions if q.turn == 0] == [
        o.elsewhere for q, o in zip(whole.questions, apart.questions, strict=True) if q.turn == 0
    ]
    # Chained questions come after the answers before them.
    chained = [{**s, "meta": {**s["meta"], "turns": "chained"}} for s in scenes()]
    after = occlusion(adapter("llava"), chained)
    expected = adapter("llava").answer_logprobs(chained)
    place = {s["id"]: i for i, s in enumerate(chained)}
    assert [q.found["picture"].sum for q in after.questions] == pytest.approx(
        [expected[place[q.id]][q.turn][0].sum for q in after.questions], abs=2e-5
    )


def test_numbers_and_sheet_are_written(tmp_path: Path) -> None:
    result = occlusion(adapter("llava"), scenes(), fill="grey", shown=3)
    found = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert found["fill"] == "grey" and found["pictures"] == len({q.picture for q in result.questions})
    assert set(found["measures"]) == {
        "change/object", "change/elsewhere", "difference", "share", "accuracy/picture", "accuracy/object",
        "accuracy/elsewhere",
    }  # fmt: skip
    assert len(result.examples) == 3 and len({e.pictures["picture"] for e in result.examples}) == 3
    sheet = result.picture(tmp_path / "new" / "occlusion.png")
    assert pixels(sheet.read_bytes()).shape[0] > 3 * 200
    assert (
        np.abs(pixels(sheet.read_bytes()) - 128).sum(-1) == 0
    ).sum() > 100  # grey holes are there to be seen
    bare = Occlusion("border", result.questions)
    assert bare.picture(tmp_path / "bare.png").is_file()


def test_what_has_no_boxes_is_counted_or_said() -> None:
    with pytest.raises(UserError, match="fill 'red': use border, grey"):
        occlusion(adapter("llava"), scenes(), fill="red")
    with pytest.raises(UserError, match="none of 2 samples has a question about an object with a box"):
        occlusion(adapter("llava"), [zoo.sample(1), zoo.sample(2, images=0)])
    good = scenes()[0]

    def changed(**meta: Any) -> dict[str, Any]:
        return {**good, "meta": {**good["meta"], **meta}}

    turns = len(good["meta"]["asked"])
    outside = [{**thing, "box": [60, 60, 70, 70]} for thing in good["meta"]["objects"]]
    everywhere = [{**thing, "box": [0, 0, 64, 40]} for thing in good["meta"]["objects"]]
    result = occlusion(
        adapter("llava"),
        [
            good,
            changed(objects=outside),
            changed(objects=everywhere, asked=[[0]] * turns),
            changed(asked=[None] * turns),
            {**good, "meta": None},
            {**good, "images": pack_images([b"no picture"])},
            {**good, "conversations": None},
        ],
    )
    assert {q.id for q in result.questions} == {good["id"]}
    assert result.skipped["no_object"] >= 3 * turns and result.skipped["no_room"] == turns
    assert result.skipped["unreadable_image"] == 1 == result.skipped["bad_conversation"]
