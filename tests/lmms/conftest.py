"""A tiny model that answers yes and no, and files of questions about pictures made here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opsin.data.chat import chat_template
from opsin.data.schema import pack_images
from opsin.evaluation.adapter import VLMAdapter
from opsin.evaluation.lmms.forms import FORMS, write_table
from opsin.evaluation.logprobs import AnswerLogprob
from opsin.evaluation.open_model import open_folder
from opsin.models.export import export_model
from opsin.models.vlm import VisionLanguageModel

import jobs
import zoo

SUFFIX = "\nAnswer the question using a single word or phrase."
COLOURS = ("red", "green", "blue")
TIMES = 19
"""Documents of a task: with two ranks one has more than the other."""


@dataclass
class Place:
    """Where the model and the files are; ``adapter`` is the same model, opened here."""

    model: Path
    adapter: VLMAdapter
    local: dict[str, dict[str, Any]]
    rows: dict[str, list[dict[str, Any]]]

    def answer(self, question: str, *pictures: int, adapter: VLMAdapter | None = None) -> str:
        """As lmms-eval's tasks want it."""
        said = (adapter or self.adapter).generate([question_of(question, *pictures)], max_new_tokens=6)[0][0]
        return said.split("\n\n")[0].strip()

    def nats(self, question: str, picture: int, choices: list[str]) -> list[AnswerLogprob]:
        return self.adapter.answer_logprobs([question_of(question, picture)], [[choices]])[0][0]


def asked(colour: str) -> str:
    return f"Is there a {colour} cube?"


def question_of(question: str, *pictures: int, answer: str = "") -> dict[str, Any]:
    """A stored sample; words without marks get their pictures in front."""
    marks = "" if "<image>" in question else "<image>\n" * len(pictures)
    return {
        "id": question,
        "conversations": [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}],
        "images": pack_images([zoo.picture(i) for i in pictures]),
        "meta": {},
    }


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The model has learnt: red is there, others are not. So it is wrong about what the files say of some."""
    folder = tmp_path_factory.mktemp("lmms")
    lessons = [
        question_of(asked(colour) + SUFFIX, i, answer="yes" if colour == "red" else "no")
        for i, colour in enumerate(["red", "green", "red", "blue"])
    ]
    everything = {"vision_tower": False, "mm_projector": True, "language_model": True}
    learnt = jobs.train(
        samples=lessons * 60, global_batch=4, steps=60, trainable=everything, lr=5e-3, template="chatml"
    )
    built = zoo.build("llava", seed=1)
    model = VisionLanguageModel(built.hf, built.processor)
    model.load_state_dict({name: learnt["weights"][name] for name in model.state_dict()})
    template = chat_template("chatml", built.processor.tokenizer.eos_token).jinja
    notes = {"chat_template": "chatml", "system_prompt": None}
    # A comma in the path: lmms-eval takes it for the end of an argument.
    exported = export_model(model, folder / "run, 1" / "model", chat_template=template, notes=notes)
    opened, collator = open_folder(str(exported))
    local, rows = write_files(folder)
    return Place(exported, VLMAdapter(opened, collator, batch_size=8), local, rows)


def write_files(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(TIMES + 1):
        (pictures / f"{i}.png").write_bytes(zoo.picture(i))
    presence = [
        {
            "question_id": i, "image": f"{i}.png", "text": asked(COLOURS[i % 3]), "label": "yes" if i % 4 else "no",
        }
        for i in range(TIMES)
    ]  # fmt: skip
    (folder / "presence.json").write_text("\n".join(map(json.dumps, presence)), encoding="utf-8")
    colours = [
        {
            "image": f"{i}.png",
            "question": "What colour?",
            "choices": ["red", "green", "blue one"],
            "answer": "ABC"[i % 3],
        }
        for i in range(TIMES)
    ]
    (folder / "colours.jsonl").write_text("\n".join(map(json.dumps, colours)), encoding="utf-8")
    two = [
        {
            "images": [f"{i}.png", f"{i + 1}.png"],
            "question": f"{'<image> and <image>: ' if i % 2 else ''}{asked(COLOURS[i % 3])}",
            "answers": ["Yes.", "Sure"] if i % 2 else ["no"],
        }
        for i in range(7)
    ]
    (folder / "two.jsonl").write_text("\n".join(map(json.dumps, two)), encoding="utf-8")
    rows = (
        (
            {"question_id": str(i), "question": asked("red"), "category": "random", "answer": "yes"},
            [zoo.picture(i)],
        )
        for i in range(3)
    )
    write_table(folder / "as_it_lies.parquet", FORMS["pope"], rows)
    local = {
        "our_presence": {
            "form": "pope", "path": str(folder / "presence.json"), "images": str(pictures), "max_new_tokens": 6,
        },
        "our_colours": {"form": "choices", "path": str(folder / "colours.jsonl"), "images": str(pictures)},
        "our_two": {"form": "open", "path": str(folder / "two.jsonl"), "images": str(pictures), "max_new_tokens": 6},
        "our_parquet": {"form": "pope", "path": str(folder / "as_it_lies.parquet"), "prompt_suffix": SUFFIX},
    }  # fmt: skip
    return local, {"our_presence": presence, "our_colours": colours, "our_two": two}
