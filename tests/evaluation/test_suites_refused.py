"""Wrong keywords and wrong files of suites, in one line each; suites as YAML makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from opsin.evaluation import benchmarks
from opsin.evaluation.benchmarks import cv_bench, mmbench, mmvp, multiple_choice, pope, scenes
from opsin.evaluation.suites import Suite
from opsin.models.errors import UserError
from opsin.training.builders import construct
from opsin.training.registry import evaluations

from question_files import cv_rows, made, mmbench_file, pope_files


def refused(act: Callable[[], Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        made(act())
    assert line in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_wrong_keywords_are_told_before_anything_is_read() -> None:
    nowhere = "/nowhere"
    for act, line in (
        (lambda: pope(nowhere, splits=["randm"]), "splits: 'randm'; did you mean 'random'?"),
        (lambda: pope(nowhere, mode="ranked"), "mode: 'ranked'; did you mean 'rank'?"),
        (lambda: pope(nowhere, limit=0), "limit: 0: use 1 or more"),
        (lambda: pope(nowhere, files="coco.json"), "files: 'coco.json': needs {split} in it"),
        (lambda: pope(nowhere, labels=("Yes", "Maybe")), "labels: 'Maybe': scorer pope should read no, and reads None"),
        (lambda: pope(nowhere, group="3D"), "group: '3D'"),
        (lambda: pope(nowhere, scorer="pop"), "scorer 'pop'; did you mean 'pope'?"),
        (lambda: mmvp(nowhere, labels="right"), "labels: 'right'"),
        (lambda: cv_bench(nowhere, part="4d"), "part: '4d'"),
        (lambda: multiple_choice(nowhere, options_in_question=1), "options_in_question: 1: use 2 to 26"),
        (lambda: multiple_choice(nowhere, options_in_question=2, choices="c"), "choices: leave it out"),
        (lambda: scenes(split="conflicts"), "split: 'conflicts'; did you mean 'conflict'?"),
        (lambda: scenes(stream="txt"), "stream: 'txt'; did you mean 'text'?"),
        (lambda: scenes(object=[1, 2]), "scenes: 'object'; did you mean 'objects'?"),
        (lambda: scenes(split="minimal_pairs", samples=3), "samples: 3: an even number for minimal_pairs"),
        (lambda: scenes(nowhere, sign=0), "scenes: sign: the dataset at path was made with its own settings"),
        (lambda: scenes(split="conflict", stream="text_skill"), "stream text_skill: not a stream of split 'conflict'"),
        (lambda: scenes(ask=["color"], samples=2), "ask: 'color'; did you mean 'colour'?"),
        (lambda: scenes(stream="caption", mode="rank", samples=2), "has no choices to rank"),
    ):  # fmt: skip
        refused(act, line)


def test_wrong_files_are_told_in_one_line(tmp_path: Path) -> None:
    given = pope_files(tmp_path / "pope")
    lines = (tmp_path / "pope" / "coco_pope_random.json").read_text()
    one = str(tmp_path / "pope" / "coco_pope_random.json")

    def random(content: str) -> Callable[[], Any]:
        Path(one).write_text(content)
        return lambda: pope(one, given["images"])

    refused(partial(pope, str(tmp_path / "pop")), "pop: no such file; did you mean 'pope'?")
    refused(partial(pope, given["path"]), "pope: has no 'COCO_0.jpg' of")
    refused(partial(pope, given["path"], "/nowhere"), "images: /nowhere: no such folder")
    refused(random(lines.replace('"label"', '"lable"')), "row 1: no column 'label'; did you mean 'lable'?")
    refused(random(lines.replace('"no"', '"maybe"')), "row 2: column 'label' is 'maybe', not yes or no")
    refused(random(lines.replace('"question_id": 1', '"question_id": 0')), "question random/0 is there twice")
    refused(random(lines.replace("COCO_1", "../COCO_1")), "row 3: picture '../COCO_1.jpg': leads out of")
    refused(random(lines.replace('"COCO_1.jpg"', "null")), "row 3: column 'image' has 0 pictures, not one")
    refused(
        random(lines.replace("Is there", "<image><image>")), "2 <image> marks in the question, 1 pictures"
    )
    refused(random("[]"), "no question in it")
    (tmp_path / "pope" / "coco_pope_popular.json").unlink()
    refused(partial(pope, **given), "has no coco_pope_popular.json; add it")

    (tmp_path / "mmvp").mkdir()
    for text, line in (
        ("1,Q,(a) x,(a)", "q.csv:2: options '(a) x' are not of the form"),
        ("1,Q,(a) x (b) y,(c)", "q.csv:2: answer '(c)' is no letter of 2 options"),
        ("0,Q,(a) x (b) y,(a)", "q.csv:2: column 'Index' is '0', not 1 or more"),
    ):
        (tmp_path / "q.csv").write_text(f"Index,Question,Options,Correct Answer\n{text}\n")
        refused(partial(mmvp, str(tmp_path / "q.csv")), line)

    for columns, line in (
        ({"answer": ["A", "B", "", "B"]}, "MMBench_DEV_EN.tsv:5: no answer; files of a test split"),
        ({"image": ["4"] * 4}, "its picture should be that of index 4, which is not there"),
        ({"index": ["3", "7", "x", "9"]}, "column 'index' is 'x', not a whole number"),
        ({"index": ["3", "7", "3", "9"]}, "index 3 is that of"),
        ({"B": ["b", "", "b", "b"]}, "nothing in column 'B'"),
    ):
        refused(partial(mmbench, str(mmbench_file(tmp_path, **columns))), line)
    refused(partial(mmbench, str(mmbench_file(tmp_path)), splits=["test"]), "splits: 'test'")
    row = cv_rows()[0]
    for change, line in (
        ({"source": "ADE"}, "source: 'ADE'; did you mean 'ADE20K'?"),
        ({"choices": "x"}, "no list of 2 to 26 options"),
    ):
        (tmp_path / "cv.jsonl").write_text(json.dumps({**row, **change}))
        refused(partial(cv_bench, str(tmp_path / "cv.jsonl")), line)
    (tmp_path / "o.csv").write_text("question,answer,A,B\nWhich?,C,x,y\n")
    refused(
        partial(multiple_choice, str(tmp_path / "o.csv")), "o.csv:2, 1: gold 'C' is none of its 2 options"
    )
    refused(partial(scenes, str(tmp_path / "mmvp")), "mmvp")


def test_every_suite_is_registered_and_its_keywords_are_checked(tmp_path: Path) -> None:
    place = lambda key: f"e.yaml:3: suites.it{key and '.' + key}"  # noqa: E731
    for name in benchmarks.__all__:
        make = evaluations.get(name, "here")
        assert make is getattr(benchmarks, name)
    built = construct(
        evaluations.get("pope", "here"), {**pope_files(tmp_path), "labels": ["yes", "no"], "limit": 2}, place
    )
    assert isinstance(built, Suite) and made(built)[0].choices == ("yes", "no")
    with pytest.raises(UserError, match=r"e\.yaml:3: suites\.it\.imags: unknown key; did you mean 'images'"):
        construct(evaluations.get("mmvp", "here"), {"path": "x", "imags": "y"}, place)
    with pytest.raises(UserError, match=r"suites\.it\.splits: expected list\[str\] \| None, got 'random'"):
        construct(evaluations.get("pope", "here"), {"path": "x", "splits": "random"}, place)
    with pytest.raises(UserError, match=r"suites\.it: needs path"):
        construct(evaluations.get("cv_bench", "here"), {}, place)
