"""Suites of scenes with made-up answers, and a reader of the page that is made of them, for tests of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from opsin.data.scenes import SceneConfig, sample
from opsin.data.schema import unpack_images
from opsin.evaluation.questions import questions
from opsin.evaluation.records import Item, prediction
from opsin.evaluation.report import write_report
from opsin.evaluation.scorers.base import Scorer

Say = Callable[[int, Item], str]


class OneWord(Scorer):
    """Answers of one word are read."""

    name = "one_word"

    def parse(self, record: Mapping[str, Any]) -> str | None:
        said = record["output"].strip(" .")
        return said if said and " " not in said else None


def scene_items(split: str, count: int) -> list[Item]:
    """Every question about some scenes."""
    items = []
    for at in range(count):
        stored = sample(SceneConfig(), 17, split, at)
        pictures = tuple((lambda data=data: data) for data in unpack_images(stored["images"]))
        items += [
            Item(f"{stored['id']}#{turn}", f"<image>\n{question}", pictures, gold, kind)
            for turn, (question, gold, kind) in enumerate(questions(stored))
        ]
    return items


def in_turn(at: int, item: Item) -> str:
    """Right, right with a full stop, wrong, and unreadable answers in turn."""
    return (item.gold, f"{item.gold}.", "zebra", "I cannot tell")[at % 4]


class Page:
    """What a page is made of.

    Args:
        suites: name -> (group, items, what the model says).
    """

    def __init__(self, suites: Mapping[str, tuple[str, Sequence[Item], Say]]):
        self.records: list[dict[str, Any]] = []
        self.scores: dict[str, Any] = {
            "model": "runs/a",
            "opsin": "0.1.0",
            "created": "2026-01-02T03:04:05Z",
            "suites": {},
        }
        self._pictures: dict[tuple[str, str], list[bytes]] = {}
        for name, (group, items, say) in suites.items():
            said = [prediction(name, item, say(at, item)) for at, item in enumerate(items)]
            marked, scores = OneWord().score(said)
            unseen = OneWord().score(said[::2])[1].as_dict()["measures"]  # as if half of them could be asked
            self.records += marked
            self.scores["suites"][name] = {
                "suite": name, "group": group, "mode": "generate", "prompt_sha256": "0" * 16, "errors": 0,
                **scores.as_dict(), "blind": {"measures": unseen},
            }  # fmt: skip
            self._pictures.update({(name, item.id): [read() for read in item.pictures] for item in items})

    def pictures(self, suite: str, name: str) -> list[bytes]:
        return self._pictures[suite, name]

    def write(self, path: Path, **options: Any) -> str:
        """Write it and read it back."""
        options.setdefault("title", "a title")
        write_report(path, self.scores, options.pop("records", self.records), self.pictures, **options)
        return path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Holds that every element is closed in order, and collects cells of tables and the text of scripts."""

    VOID = ("meta", "link", "img", "input", "wbr")

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.rows: list[list[str]] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names))
        self.tags[tag] += 1
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "small" and self.rows and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += " | "
        if tag == "script":
            self.scripts.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data

    def row(self, start: str) -> list[str]:
        """The first row whose first cell begins so."""
        return next(row for row in self.rows if row[0].startswith(start))
