"""What can be scored, the columns of the table, and the sheet of pictures."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from opsin.data.collate import VLMCollator
from opsin.data.schema import pack_images, unpack_images
from opsin.evaluation.blind import Majority
from opsin.evaluation.packed import score
from opsin.evaluation.questions import questions
from opsin.evaluation.scorecard import as_table, scorecard
from opsin.evaluation.sheet import CELL, MARGIN, TEXT, sample_sheet
from opsin.evaluation.usable import usable
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo


@lru_cache
def model() -> VisionLanguageModel:
    built = zoo.build("llava")
    return VisionLanguageModel(built.hf, built.processor)


def collator(length: int = 400) -> VLMCollator:
    return jobs.collator(zoo.build("llava"), max_seq_len=length)


def kinds(sample: dict, *names: str) -> dict:
    return {**sample, "meta": {**sample["meta"], "kinds": list(names)}}


def spoilt() -> list[dict]:
    """Every way in which a sample cannot be used, among some that can."""
    unreadable = {**zoo.sample(11), "images": pack_images([b"no picture"])}
    torn = {**zoo.sample(12), "images": b"\x01"}
    answerless = zoo.sample(13)
    answerless["conversations"][-1] = {"from": "gpt", "value": " "}
    half = zoo.sample(14, turns=2)
    half["conversations"].pop()
    return [
        kinds(zoo.sample(0, turns=2), "colour", "number"),
        unreadable,
        torn,
        kinds(zoo.sample(1), "colour"),
        kinds(zoo.sample(15, turns=3), "colour"),  # one kind for three questions
        answerless,
        half,
        {**zoo.sample(16), "conversations": None},
        {**zoo.sample(17), "images": pack_images([])},  # a mark, no picture
        zoo.sample(2),
    ]


def test_samples_that_cannot_be_used_are_counted_once_by_reason_and_stop_no_row() -> None:
    samples = spoilt()
    found = usable(collator().encoder, samples)
    assert [s["id"] for s in found.samples] == ["zoo/0", "zoo/1", "zoo/2"]
    assert (found.questions, found.left_out) == (4, 0)
    assert found.reasons() == {
        "bad_conversation": 2, "bad_kinds": 1, "empty_answer": 1, "image_count": 1, "unreadable_image": 2,
    }  # fmt: skip
    assert {s.id for s in found.skipped} == {f"zoo/{i}" for i in range(11, 18)}
    card = scorecard(model(), collator(), samples, majority=Majority(samples), batch_size=2)
    assert {kind: row["n"] for kind, row in card.items()} == {"colour": 2, "number": 1, "all": 4}
    assert len(score(model(), collator(), samples)) == 4


def test_exchanges_that_do_not_fit_are_cut_off_and_counted() -> None:
    whole = kinds(zoo.sample(3, turns=3, independent=True), "a", "b", "c")
    chained = zoo.sample(4, turns=3)
    chained["conversations"][4]["value"] = "<image>\n" + chained["conversations"][4]["value"]
    chained["images"] = pack_images([*unpack_images(chained["images"]), zoo.picture(99)])
    spoken = {**zoo.sample(5, turns=2)}
    spoken["conversations"] = [{"from": "system", "value": "Be brief."}, *spoken["conversations"]]
    for sample in (whole, chained, spoken):
        asked = questions(sample)
        short = collator(len(collator().encoder(sample)) - 1)  # the last one does not fit
        found = usable(short.encoder, [sample])
        (cut,) = found.samples
        assert (found.questions, found.left_out, found.skipped) == (len(asked) - 1, 1, [])
        assert questions(cut) == asked[:-1]
        one, other = short.encoder(sample), short.encoder(cut)
        assert (one.truncated_turns, other.truncated_turns) == (1, 0)
        assert np.array_equal(one.input_ids, other.input_ids) and len(one.images) == len(other.images) == 1
        card = scorecard(model(), short, [sample, {**sample, "id": "b"}], majority=Majority([sample]))
        assert card["all"]["n"] == 2 * len(asked) - 2 and card["all"]["majority"] == 1.0


def test_the_columns_of_the_card() -> None:
    same = pack_images([zoo.picture(5)])
    lonely = kinds({**zoo.sample(7, images=0)}, "text")
    samples = [kinds({**zoo.sample(i), "images": same}, "colour") for i in range(3)]
    card = scorecard(model(), collator(), [*samples, lonely], majority=Majority(samples))
    assert list(card) == ["colour", "text", "all"]
    # One picture everywhere: nothing can be swapped, and the row says so instead of showing the same picture.
    assert [card[k]["n_blind"] for k in card] == [0, 0, 0] and all(card[k]["blind"] is None for k in card)
    assert (
        card["colour"]["majority"] == 1.0
        and card["text"]["majority"] == 0.0
        and card["all"]["majority"] == 0.75
    )
    assert card["all"]["standard_error"] == 0.0  # a random model is never right
    other = {**samples[0], "id": "other", "images": pack_images([zoo.picture(6)])}
    card = scorecard(model(), collator(), [*samples, other, lonely])
    assert card["all"]["n_blind"] == 4 and card["all"]["n"] == 5 and card["text"]["n_blind"] == 0
    assert card["all"]["majority"] is None and card["all"]["blind"] == 0.0
    empty = scorecard(model(), collator(), [])
    assert empty == {
        "all": {"n": 0, "trained": None, "blind": None, "blind_blank": None, "n_blind": 0, "majority": None, "standard_error": None}
    }  # fmt: skip


def test_the_table_shows_every_column() -> None:
    row = {
        "n": 8,
        "trained": 0.75,
        "blind": 0.25,
        "blind_blank": 0.5,
        "n_blind": 8,
        "majority": None,
        "standard_error": 0.15,
    }
    card = {"colour": row, "all": {**row, "n_blind": 4, "majority": 1.0}}  # fmt: skip
    said = io.StringIO()
    Console(file=said, width=200).print(as_table(card, "a title"))
    lines = said.getvalue().splitlines()
    assert lines[0].strip() == "a title"
    for header in (
        "kind",
        "n",
        "trained",
        "blind: another picture",
        "blind: blank picture",
        "majority answer",
    ):
        assert header in lines[2]
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells == [
        ["colour", "8", "0.75 ±0.15", "0.25", "0.50", "-"],
        ["all", "8", "0.75 ±0.15", "0.25 (n 4)", "0.50", "1.00"],
    ]


def test_the_sheet_shows_pictures_and_words(tmp_path: Path) -> None:
    samples = [zoo.sample(0), zoo.sample(1, size=(300, 150)), zoo.sample(2, images=0)]
    gold = [[answer for _, answer, _ in questions(s)] for s in samples]
    path = sample_sheet(samples, gold, tmp_path / "new" / "sheet.png", columns=2)
    right = np.asarray(Image.open(path)).astype(int)
    assert right.shape == (MARGIN + 2 * (CELL + TEXT + MARGIN), MARGIN + 2 * (CELL + MARGIN), 3)
    wrong = np.asarray(
        Image.open(sample_sheet(samples, [["red"], gold[1], [""]], tmp_path / "other.png", columns=2))
    ).astype(int)
    background = right[0, 0]

    def cell(sheet: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
        top, left = MARGIN + i // 2 * (CELL + TEXT + MARGIN), MARGIN + i % 2 * (CELL + MARGIN)
        block = sheet[top : top + CELL + TEXT, left : left + CELL]
        return block[:CELL], block[CELL:]

    pictures, words = zip(*(cell(right, i) for i in range(3)), strict=True)
    assert pictures[0].std() > 20 and pictures[1].std() > 20 and not np.array_equal(pictures[0], pictures[1])
    assert (pictures[2] == background).all()  # no picture, nothing drawn
    assert all(((w != background).any(-1)).sum() > 100 for w in words)  # text is there
    assert not np.array_equal(words[0], words[1])
    # What was said is drawn: green when right, red beside the gold answer when wrong.
    verdicts = [cell(wrong, i)[1] for i in range(3)]
    assert np.array_equal(verdicts[1], words[1])
    for before, after in ((words[0], verdicts[0]), (words[2], verdicts[2])):
        green, red = (
            (before[52:, :, 1] - before[52:, :, 0]).max(),
            (after[52:, :, 0] - after[52:, :, 1]).max(),
        )
        assert green > 50 and red > 50 and np.array_equal(before[:50], after[:50])


@pytest.mark.world
def test_work_dealt_to_ranks_comes_back_in_order(ranks) -> None:
    arguments = {"items": list(range(11)), "work": list, "chunk": 3}
    for answer in ranks.run("jobs:_make", name="opsin.evaluation.ranks:on_all_ranks", kwargs=arguments):
        assert answer == list(range(11))
    nothing = {"items": [], "work": list}
    assert ranks.run("jobs:_make", name="opsin.evaluation.ranks:on_all_ranks", kwargs=nothing) == [[], []]
