"""The rows that do not look: other pictures, blank ones, the majority's answer."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from opsin.data.chat import BadConversation
from opsin.data.schema import pack_images, unpack_images
from opsin.evaluation.blind import Majority, with_blank_pictures, with_other_pictures
from opsin.evaluation.questions import kinds_of, questions

import zoo

A, B, C = (pack_images([zoo.picture(i)]) for i in range(3))


def about(name: str, images: bytes) -> dict:
    return {"id": name, "images": images, "conversations": []}


def test_rows_about_one_picture_get_another_one() -> None:
    rows = [about("0", A), about("1", A), about("2", B), about("3", B), about("4", C), about("5", A)]
    changed = with_other_pictures(rows)
    assert [r["id"] for r in changed] == ["0", "1", "2", "3", "4", "5"]
    assert [r["images"] for r in changed] == [B, B, C, C, A, B]
    assert [r["images"] for r in rows] == [A, A, B, B, C, A]  # what came in is as it was


def test_a_sample_without_another_picture_is_left_out_of_the_blind_row() -> None:
    pair = pack_images([zoo.picture(7), zoo.picture(8)])
    none = pack_images([])
    rows = [about("0", A), about("pair", pair), about("1", B), about("no", none), about("neither", none)]
    assert [(r["id"], r["images"]) for r in with_other_pictures(rows)] == [("0", B), ("1", A)]
    assert with_other_pictures([about("0", A), about("1", A)]) == []


def test_blank_pictures_are_grey_and_of_the_same_size() -> None:
    row = {**about("0", pack_images([zoo.picture(1, (20, 16)), zoo.picture(2, (9, 31))])), "meta": {"a": 1}}
    (blank,) = with_blank_pictures([row])
    pictures = [Image.open(io.BytesIO(data)) for data in unpack_images(blank["images"])]
    assert [p.size for p in pictures] == [(20, 16), (9, 31)] and blank["meta"] == {"a": 1}
    assert all((np.asarray(p.convert("RGB")) == 128).all() for p in pictures)
    assert with_blank_pictures([about("0", pack_images([]))])[0]["images"] == pack_images([])


def asked(*exchanges: tuple[str, str, str]) -> dict:
    turns = []
    for question, answer, _ in exchanges:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {
        "id": "x", "conversations": turns, "images": pack_images([]), "meta": {"kinds": [k for *_, k in exchanges]},
    }  # fmt: skip


def test_the_majority_knows_the_words_first_then_the_kind() -> None:
    majority = Majority(
        [
            asked(("<image>\nwhat colour ?", "red", "colour"), ("how large ?", "small", "size")),
            asked(("<image>\nwhat colour ?", "red ", "colour"), ("how large ?", "large", "size")),
            asked(("<image>\nwhich colour ?", "blue", "colour"), ("what colour ?", "green", "colour")),
            {
                **asked(("what colour ?", "green", "colour")),
                "meta": {"kinds": ["colour", "size"]},
            },  # kinds: 2 of 1
            {"id": "bad", "conversations": [{"from": "human", "value": "?"}], "images": b"", "meta": {}},
        ]
    )
    assert majority.answer("what colour ?", "colour") == "red"
    assert majority.answer("never asked", "colour") == "red"
    assert majority.answer("how large ?", "size") == "large"  # a tie: the first by the alphabet
    assert majority.answer("never asked", "never seen") == ""
    sample = asked(("<image>\nwhat colour ?", "red", "colour"), ("new ?", "small", "size"))
    assert majority.right(sample) == [True, False]


def test_kinds_fit_the_questions_or_are_refused() -> None:
    sample = asked(("<image> a ?", "b", "k"), ("c ?", "d", "l"))
    assert questions(sample) == [("a ?", "b", "k"), ("c ?", "d", "l")]
    assert kinds_of({**sample, "meta": {}}, 2) == kinds_of({**sample, "meta": None}, 2) == ["all", "all"]
    assert kinds_of(sample, 1) == ["k"]
    system = [{"from": "system", "value": "s"}, *sample["conversations"]]
    assert questions({**sample, "conversations": system}) == questions(sample)
    for kinds in (["k"], ["k", "l", "m"], "kl", {"k": 1, "l": 2}):
        with pytest.raises(BadConversation, match="should name 2 kinds, one a question"):
            kinds_of({**sample, "meta": {"kinds": kinds}}, 2)
