"""What of the lmms-eval bridge needs no lmms-eval: requests, columns, results, errors."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opsin.data.schema import unpack_images
from opsin.evaluation.lmms.columns import pictures, question, right_choice
from opsin.evaluation.lmms.forms import FORMS
from opsin.evaluation.lmms.requests import cut, generation, pictures_of, question_of, sample_of_messages
from opsin.evaluation.lmms.results import first_error, read_results
from opsin.evaluation.lmms.run import run_lmms
from opsin.evaluation.open_model import model_folder
from opsin.evaluation.readers import Row
from opsin.models.errors import UserError

import zoo


def opened(seed: int) -> Image.Image:
    return Image.open(io.BytesIO(zoo.picture(seed)))


def test_pictures_keep_their_pixels_whatever_they_come_in(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(zoo.picture(1))
    found = pictures_of([[opened(0)], (str(tmp_path / "a.png"), None)], "task t, document 0")
    for i, encoded in enumerate(found):
        assert Image.open(io.BytesIO(encoded)).tobytes() == opened(i).tobytes()
    assert pictures_of(None, "") == []
    (tmp_path / "film.mp4").write_bytes(b"film")
    for odd in (str(tmp_path / "film.mp4"), {"array": [0], "sampling_rate": 8}):
        with pytest.raises(UserError, match=r"task t, document 0: .*pictures only"):
            pictures_of([odd], "task t, document 0")


def test_marks_of_the_words_count_else_pictures_stand_in_front() -> None:
    assert question_of("What?", 2, "t") == "<image>\n<image>\nWhat?"
    assert question_of("<image> or <image>?", 2, "t") == "<image> or <image>?"
    assert question_of("What?", 0, "t") == "What?"
    with pytest.raises(UserError, match=r"t: 1 <image> marks in the words, 2 pictures"):
        question_of("<image> What?", 2, "t")


@pytest.mark.parametrize(
    ("given", "options", "stops"),
    [
        ({}, {"max_new_tokens": 99, "do_sample": False}, []),
        ({"until": ["\n\n", ""], "max_new_tokens": 8.0}, {"max_new_tokens": 8, "do_sample": False}, ["\n\n"]),
        ({"temperature": 0, "top_p": 0, "num_beams": 1, "do_sample": True, "until": "."}, {"num_beams": 1, "max_new_tokens": 99, "do_sample": False}, ["."]),
        ({"temperature": 0.7, "top_p": None, "max_gen_toks": 5}, {"temperature": 0.7, "max_new_tokens": 5, "do_sample": True}, []),
        ({"do_sample": False, "temperature": 1.0}, {"max_new_tokens": 99, "do_sample": False}, []),
        ({"do_sample": True}, {"max_new_tokens": 99, "do_sample": True}, []),
    ],
)  # fmt: skip
def test_generation_arguments(given: dict[str, Any], options: dict[str, Any], stops: list[str]) -> None:
    before = json.dumps(given)
    assert generation(given, 99) == (options, stops, [])
    assert json.dumps(given) == before  # lmms-eval shares it between requests
    assert generation({**given, "modalities": ["image"]}, 99)[2] == ["modalities"]


def test_an_answer_ends_at_the_first_stop() -> None:
    assert cut("yes\n\nbecause. so", [".", "\n\n"]) == "yes"
    assert cut(" yes ", []) == "yes" and cut("yes", ["\n\n"]) == "yes"


def test_messages_become_turns_with_marks_where_the_pictures_stood() -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "url": opened(0)}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cube."}]},
        {"role": "user", "content": [{"type": "text", "text": "Like "}, {"type": "image", "url": opened(1)}]},
        {"role": "user", "content": "this?"},
    ]
    sample = sample_of_messages("t", said)
    assert [(t["from"], t["value"]) for t in sample["conversations"]] == [
        ("system", "Be brief."), ("human", "<image>\nWhat?"), ("gpt", "A cube."), ("human", "Like <image>\n\nthis?"), ("gpt", ""),
    ]  # fmt: skip
    shown = [Image.open(io.BytesIO(one)).tobytes() for one in unpack_images(sample["images"])]
    assert shown == [opened(0).tobytes(), opened(1).tobytes()]
    for wrong, line in (
        (said[:3], "t: the last message is no question"),
        ([{"role": "tool", "content": "x"}], "t: a message of 'tool'"),
        ([{"role": "user", "content": [{"type": "video", "url": "x"}]}], "t: a message with a video"),
    ):
        with pytest.raises(UserError, match=line):
            sample_of_messages("t", wrong)


def test_columns_of_local_files() -> None:
    known = {"choices": ["red", "B", "3"]}
    for answer, at in ((1, 1), ("red", 0), ("(c)", 2), ("A.", 0), ("B", 1), ("3", 2), ("0", 0)):
        assert right_choice({**known, "answer": answer}) == at
    for answer in ("blue", "D", 4, -1, "7"):
        with pytest.raises(ValueError, match="is none of"):
            right_choice({**known, "answer": answer})
    with pytest.raises(ValueError, match="answer 1 is the index of '2' and the text of another"):
        right_choice({"choices": ["1", "2"], "answer": 1})
    assert pictures({"image": "a"}) == ["a"] and pictures({"images": ["a", "b"], "image": "c"}) == ["a", "b"]
    assert pictures({"images": None}) == []
    assert (
        question({"question": "q"}, {"pre_prompt": "a ", "post_prompt": " z"}) == "a q z"
        and question({"question": "q"}) == "q"
    )


def test_rows_of_other_forms_become_the_columns_of_a_task() -> None:
    mmbench = Row(
        {"index": "7", "question": "Which?", "A": "cat", "B": "dog", "C": "", "answer": "B"}, "f.tsv:2"
    )
    assert FORMS["choices"].of(mmbench) == {"question": "Which?", "choices": ["cat", "dog"], "answer": "dog"}
    listed = Row({"question": "Which?", "choices": "['cat', \"dog's\"]", "answer": 1}, "f.csv:2")
    assert FORMS["choices"].of(listed)["choices"] == ["cat", "dog's"]
    pope = Row({"question_id": 1, "text": "Is it?", "label": "No", "image": "a.jpg"}, "f.json: row 1")
    assert FORMS["pope"].of(pope) == {
        "question_id": "1",
        "question": "Is it?",
        "category": "all",
        "answer": "no",
    }
    assert FORMS["open"].of(Row({"question": "q", "answer": 5}, "f"))["answers"] == ["5"]
    for form, row, line in (
        ("choices", {"question": "q", "A": "cat", "answer": "A"}, "f: 1 choices"),
        ("choices", {"question": "q", "choices": ["a", "b"], "answer": "c"}, "f: answer 'c' is none of"),
        ("pope", {"question_id": 1, "text": "q", "label": "maybe"}, "f: answer 'maybe'"),
        ("open", {"question": "q", "answers": "[a"}, "f: column 'answers' starts as a list and is none"),
    ):
        with pytest.raises(UserError, match=line):
            FORMS[form].of(Row(row, "f"))


def results(**changes: Any) -> dict[str, Any]:
    entry = {
        "alias": "a",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "acc_stderr_clt,none": 0.2,
        "cider,strict": 1.5,
        "cider_stderr,strict": "N/A",
    }
    return {
        "results": {"a": entry, "b": {"alias": "b", "acc,none": float("nan")}, "g": {"alias": "g", "acc,none": 0.5}},
        "n-samples": {"a": {"original": 9, "effective": 4}, "b": {"original": 9, "effective": 9}},
        "group_subtasks": {"g": ["a"], "a": [], "b": []},
        "configs": {"a": {"tag": ["marked"]}, "b": {"tag": None}},
        **changes,
    }  # fmt: skip


def test_results_hold_the_numbers_of_every_asked_task(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results for a, b"):
        read_results(tmp_path, ["a", "b"])
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "1_results.json").write_text(json.dumps(results()), encoding="utf-8")
    (folder / "1_samples_a.jsonl").write_text("", encoding="utf-8")
    found = read_results(tmp_path, ["a", "g", "marked", "a*"])
    assert found["tasks"]["a"] == {
        "n": 4,
        "primary": "acc",
        "measures": {
            "acc": {"value": 0.5, "n": 4, "standard_error": 0.1, "unit": "share"},
            "cider/strict": {"value": 1.5, "n": 4, "standard_error": None, "unit": "number"},
        },
        "samples": "model/1_samples_a.jsonl",
    }
    assert found["groups"]["g"]["tasks"] == ["a"] and found["groups"]["g"]["measures"]["acc"]["value"] == 0.5
    for lacking in ("b", "c", "c*", "unmarked"):
        with pytest.raises(UserError, match=f"no results for {lacking.replace('*', '.')}$"):
            read_results(tmp_path, ["a", lacking])
    (folder / "1_results.json").write_text(
        json.dumps(results(**{"n-samples": {"a": {"effective": 0}}})), encoding="utf-8"
    )
    with pytest.raises(UserError, match="no results for a"):
        read_results(tmp_path, ["a"])


@pytest.mark.parametrize(
    ("log", "code", "line"),
    [
        ("\x1b[31mINFO\x1b[0m\nTraceback (most recent call last):\n  File x\nKeyError: 'answer'\n\nThe above ...\nTraceback (most recent call last):\ntenacity.RetryError: RetryError[...]", 0, "KeyError: 'answer'"),
        ("Traceback (most recent call last):\n  x\nopsin.models.errors.UserError: task t, document 3: too long", 0, "task t, document 3: too long"),
        ("[rank1]: Traceback (most recent call last):\n[rank1]:   x\n[rank1]: torch.OutOfMemoryError: CUDA", 1, "OutOfMemoryError: CUDA"),
        ("usage: x\nerror: argument --limit: invalid\n\n", 2, "exit status 2: error: argument --limit: invalid"),
        ("ValueError: no trace, so a message\nend", 0, "exit status 0: end"),
        ("", 0, "exit status 0: it said nothing"),
        ("half way", -9, "it was ended by Killed, perhaps for lack of memory"),
    ],
)  # fmt: skip
def test_the_first_error_of_a_run_is_told(log: str, code: int, line: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log, encoding="utf-8")
    assert first_error(tmp_path / "log", code) == line


def test_a_run_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    for given, line in (
        ({}, "nothing is asked"),
        ({"tasks": ["a", "a"]}, "task a: given twice"),
        ({"tasks": ["list"]}, "'list': no name of a task"),
        ({"tasks": ["--help"]}, "'--help': no name of a task"),
        ({"tasks": "a", "limit": 0}, "limit: 0: use a number, 1 or more"),
        ({"local": {"a": {}}, "include_path": str(tmp_path)}, "local and include_path: use one"),
        ({"tasks": "a", "include_path": str(tmp_path / "no")}, "no such folder"),
    ):
        with pytest.raises(UserError, match=line):
            run_lmms("model", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"lmms-eval is not installed in this environment; install .* extra 'eval'"
    ):
        run_lmms("model", tmp_path, tasks="pope")


def test_where_a_model_lies(tmp_path: Path) -> None:
    for folder, file in (
        ("run", "config.yaml"),
        ("done", "config.yaml"),
        ("done/model", "config.json"),
        ("bare", "config.json"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text("{}", encoding="utf-8")
    assert model_folder(str(tmp_path / "done")) == str(tmp_path / "done" / "model")
    assert (
        model_folder(str(tmp_path / "bare")) == str(tmp_path / "bare")
        and model_folder("org/name") == "org/name"
    )
    with pytest.raises(UserError, match="run: this run has not finished"):
        model_folder(str(tmp_path / "run"))
    with pytest.raises(UserError, match="dome: no run and no model folder; did you mean 'done'"):
        model_folder(str(tmp_path / "dome"))
