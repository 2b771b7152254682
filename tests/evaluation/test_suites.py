"""Suites from files of the official forms, made here: items, pictures, pairs, order, scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsin.evaluation.benchmarks import (
    cv_bench,
    hallusion_bench,
    mmbench,
    mmvp,
    multiple_choice,
    open_answers,
    pope,
)

from question_files import (
    cv_rows,
    hallusion_file,
    made,
    mmbench_file,
    mmvp_files,
    parquet,
    picture,
    pope_files,
    scored,
)

LETTER = "\nAnswer with the option's letter from the given choices directly."


def test_pope_from_its_own_files(tmp_path: Path) -> None:
    given = pope_files(tmp_path)
    suite = pope(**given)
    items = made(suite)
    assert (suite.group, suite.mode, suite.max_new_tokens) == ("hallucination", "generate", 8)
    assert [item.id for item in items[:4]] == ["random/0", "popular/0", "adversarial/0", "random/1"]
    assert len(items) == 12 and items[3].gold == "no" and items[3].kind == "random"
    assert items[0].question == (
        "<image>\nIs there a random 0 in the image?\nAnswer the question using a single word or phrase."
    )
    assert [read() for read in items[6].pictures] == [picture(1)]
    assert scored(suite, items, lambda item: item.gold)["mean_of_splits"] == 1
    ranked = pope(**pope_files(tmp_path / "again"), mode="rank", prompt="", limit=3)
    assert [item.choices for item in made(ranked)] == [("Yes", "No")] * 3
    assert {item.kind for item in ranked.load()} == {"random", "popular", "adversarial"}
    one = made(pope(str(tmp_path / "coco_pope_popular.json"), str(tmp_path / "val2014")))
    assert [item.id for item in one] == [f"popular/{i}" for i in range(4)]
    two = made(
        pope([str(tmp_path / f"coco_pope_{split}.json") for split in ("popular", "random")], given["images"])
    )
    assert [item.id for item in two[:3]] == ["popular/0", "random/0", "popular/1"]


def test_pope_from_parquet_is_the_same_questions(tmp_path: Path) -> None:
    given = pope_files(tmp_path)
    rows, images = [], []
    for split in ("adversarial", "popular", "random"):
        for line in (tmp_path / f"coco_pope_{split}.json").read_text().splitlines():
            row = json.loads(line)
            rows.append({"id": str(len(rows)), "question_id": str(row["question_id"]), "question": row["text"], "answer": row["label"], "category": split})  # fmt: skip
            images.append((tmp_path / "val2014" / row["image"]).read_bytes())
    (tmp_path / "hub").mkdir()
    parquet(tmp_path / "hub" / "test-00000-of-00001.parquet", rows, images)
    ours, theirs = (
        sorted(made(pope(**keys)), key=lambda item: item.id)
        for keys in (given, {"path": str(tmp_path / "hub")})
    )
    for one, other in zip(ours, theirs, strict=True):
        assert (one.id, one.question, one.gold, one.kind) == (
            other.id,
            other.question,
            other.gold,
            other.kind,
        )
        assert one.pictures[0]() == other.pictures[0]()
    part = made(pope(str(tmp_path / "hub"), splits=["popular"], limit=3))
    assert [item.id for item in part] == ["popular/0", "popular/1", "popular/2"]


def test_mmvp_pairs_and_both_label_versions(tmp_path: Path) -> None:
    mmvp_files(tmp_path)
    official, corrected = (made(mmvp(str(tmp_path), labels=labels)) for labels in ("official", "corrected"))
    assert [item.id for item in official] == ["1", "2", "99", "100", "279", "280"]
    assert [item.meta["pair"] for item in official] == [0, 0, 49, 49, 139, 139]
    assert [item.gold for item in official] == ["A", "B"] * 3
    assert [item.gold for item in corrected] == ["A", "B", "B", "A", "B", "A"]
    assert official[2].question == f"<image>\nIs it 49, or not?\nA. Open, wide\nB. Closed{LETTER}"
    assert official[2].pictures[0]() == picture(99) and official[0].choices == ("A", "B")
    assert (
        official[0].meta["options"] == ["Open, wide", "Closed"] and corrected[0].meta["labels"] == "corrected"
    )
    numbers = scored(mmvp(str(tmp_path)), official, lambda item: "a" if item.id != "2" else "(b) Closed")
    assert (numbers["pair_accuracy"], numbers["accuracy"]) == (1 / 3, 4 / 6)
    rows = [
        {"Index": int(i.id), "Question": "Is it?", "Options": "(a) Open (b) Closed", "Correct Answer": f"({i.gold.lower()})"}
        for i in corrected
    ]  # fmt: skip
    parquet(tmp_path / "q.parquet", rows, [picture(i) for i in range(6)])
    for labels, items in (("official", official), ("corrected", corrected)):
        again = made(mmvp(str(tmp_path / "q.parquet"), labels=labels))
        assert [item.gold for item in again] == [item.gold for item in items]
        assert [item.pictures[0]() for item in again] == [picture(i) for i in range(6)]


def test_cv_bench_from_parquet_and_from_json_lines(tmp_path: Path) -> None:
    rows = cv_rows()
    for part in ("2d", "3d"):
        (tmp_path / "lines" / "img" / part.upper()).mkdir(parents=True)
        chosen = [row for row in rows if row["type"].lower() == part]
        for row in chosen:
            (tmp_path / "lines" / row["filename"]).write_bytes(picture(row["idx"]))
        (tmp_path / "lines" / f"test_{part}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
        parquet(tmp_path / f"test_{part}.parquet", chosen, [picture(row["idx"]) for row in chosen])
    suite = cv_bench(str(tmp_path))
    items = made(suite)
    assert [item.meta["source"] for item in items] == ["ADE20K", "COCO", "Omni3D"] * 3
    assert {item.kind for item in items} == {"Count", "Relation", "Depth"} and items[0].id == "2D/0"
    assert items[0].question == f"<image>\n{rows[0]['prompt']}{LETTER}" and items[3].choices == (
        "A",
        "B",
        "C",
    )
    lines = made(cv_bench(str(tmp_path / "lines")))
    assert [(i.id, i.question, i.gold, i.pictures[0]()) for i in lines] == [
        (i.id, i.question, i.gold, i.pictures[0]()) for i in items
    ]
    numbers = scored(suite, items, lambda item: "(B)" if item.meta["source"] != "COCO" else "A")
    assert (numbers["2d"], numbers["3d"], numbers["overall"], numbers["accuracy"]) == (0.5, 1, 0.75, 2 / 3)
    half = cv_bench(str(tmp_path), part="3d")
    assert half.group == "3d" and {item.id[:2] for item in made(half)} == {"3D"}
    assert scored(half, made(half), lambda _: "B")["3d"] == 1
    assert len(made(cv_bench(str(tmp_path / "lines" / "test_2d.jsonl"), part="2d"))) == 6


def test_mmbench_copies_follow_their_question_and_share_its_picture(tmp_path: Path) -> None:
    file = mmbench_file(tmp_path)
    suite = mmbench(str(file), splits=["dev"])
    items = made(suite)
    assert [item.id for item in items] == ["3", "1000003", "7", "1000007"]
    assert [item.gold for item in items] == ["A", "B", "A", "B"]
    assert items[0].question == f'<image>\nLook\nclosely.\nWhich 3?\nA. x3\nB. a "quoted"\toption{LETTER}'
    assert [item.pictures[0]() for item in items] == [picture(3), picture(3), picture(7), picture(7)]
    assert (items[2].kind, items[1].meta["index"]) == ("cat7", 1000003)
    numbers = scored(suite, items, lambda item: "A" if item.id != "1000003" else "B")
    assert (numbers["circular_accuracy"], numbers["accuracy"]) == (0.5, 0.75)
    assert [item.id for item in made(mmbench(str(file), limit=2))] == ["3", "1000003"]
    again = mmbench_file(tmp_path, hint=["nan"] * 4, C=["nan"] * 4)  # pandas' words for nothing
    assert made(mmbench(str(again)))[0].question == f'<image>\nWhich 3?\nA. x3\nB. a "quoted"\toption{LETTER}'


@pytest.mark.parametrize("prefix", ["./", "./hallusion_bench/"])
def test_hallusion_bench_with_and_without_pictures(tmp_path: Path, prefix: str) -> None:
    file = hallusion_file(tmp_path, prefix)
    suite = hallusion_bench(str(tmp_path))
    items = made(suite)
    assert [item.id for item in items] == [
        "VS/chart/0/0/0",
        "VS/chart/0/1/0",
        "VD/chart/0/0/0",
        "VD/chart/0/1/1",
    ]
    assert [item.question for item in items[:2]] == ["Is VS 0?", "<image>\nIs VS 1?"]
    assert [item.gold for item in items] == ["no", "yes", "no", "yes"] and items[3].kind == "VD/chart"
    assert [read() for item in items for read in item.pictures] == [picture(1), picture(0), picture(1)]
    numbers = scored(suite, items, lambda item: "No, it is not." if item.id != "VD/chart/0/1/1" else "Yes")
    assert (numbers["aAcc"], numbers["fAcc"], numbers["qAcc"]) == (0.75, 0.75, 2 / 3)
    assert len(made(hallusion_bench(str(file), without_picture=False))) == 3
    assert made(hallusion_bench(str(file), mode="rank", labels=("yes", "no")))[0].choices == ("yes", "no")
    rows = json.loads(file.read_text())
    parquet(tmp_path / "q.parquet", rows, [None, picture(1), picture(0), picture(1)])
    for one, other in zip(items, made(hallusion_bench(str(tmp_path / "q.parquet"))), strict=True):
        assert (one.id, one.question, one.gold) == (other.id, other.question, other.gold)
        assert [read() for read in one.pictures] == [read() for read in other.pictures]


def test_other_files_by_the_names_of_their_columns(tmp_path: Path) -> None:
    for i in (1, 2):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    star = [
        {"index": 5, "question": "<image 1>Which?\nOptions: A: x, B: y, C: z", "answer": "C", "category": "math", "image_path": "1.png"},
        {"index": 6, "question": "Which?\nOptions: A: x, B: y, C: z", "answer": "a", "category": "", "image_path": ""},
    ]  # fmt: skip
    (tmp_path / "star.json").write_text(json.dumps(star))
    items = made(multiple_choice(str(tmp_path / "star.json"), options_in_question=3, group="reasoning"))
    assert items[0].question == f"<image>Which?\nOptions: A: x, B: y, C: z{LETTER}"
    assert [(i.id, i.kind, i.gold, len(i.pictures)) for i in items] == [
        ("5", "math", "C", 1),
        ("6", "all", "A", 0),
    ]
    blink = [
        {"Q": "Is <image 1> or <image 2> redder?", "right": "the second", "opts": ["the first", "the second"], "one": "1.png", "two": "2.png", "sort": "t"}
    ]  # fmt: skip
    (tmp_path / "blink.jsonl").write_text(json.dumps(blink[0]))
    (item,) = made(
        multiple_choice(
            str(tmp_path / "blink.jsonl"), question="Q", answer="right", choices="opts", image=["one", "two"], category="sort",
        )
    )  # fmt: skip
    assert item.question == f"Is <image> or <image> redder?\nA. the first\nB. the second{LETTER}"
    assert (item.gold, item.kind, item.id) == ("B", "t", "1") and [p() for p in item.pictures] == [
        picture(1),
        picture(2),
    ]
    (tmp_path / "open.csv").write_text("question,answer,image\nHow many?,Two.,1.png\n")
    suite = open_answers(str(tmp_path / "open.csv"), prompt="")
    (item,) = made(suite)
    assert (item.question, item.gold) == ("<image>\nHow many?", "Two.")
    assert scored(suite, [item], lambda _: "two")["accuracy"] == 1


def test_suites_from_an_object_store(s3: Path) -> None:
    given = pope_files(s3 / "data" / "pope")
    here = made(pope(**given))
    there = made(pope("s3://data/pope", "s3://data/pope/val2014"))
    assert [(i.id, i.question, i.pictures[0]()) for i in there] == [
        (i.id, i.question, i.pictures[0]()) for i in here
    ]
    mmvp_files(s3 / "data" / "mmvp")
    assert [item.pictures[0]() for item in made(mmvp("s3://data/mmvp"))][:2] == [picture(1), picture(2)]
