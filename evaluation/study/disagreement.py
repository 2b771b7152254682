"""The wall of pictures about which cells disagree: what a difference of two points looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.schema import stable_hash
from ..report.markup import Markup, breakable, join, tag
from ..report.numbers import count, plain
from ..report.thumbnails import Thumbnails
from ..report.wall import Pictures, Wall, controls, cut, shots, words_of
from .folder import METHOD_ROLES, Study
from .reading import Read

VERDICTS = {
    "right": ("▲", "Gains"),
    "wrong": ("▼", "Losses"),
    "unparsed": ("◆", "Gains and losses"),
}
"""What becomes of a question beside the baseline: a sign and a word. Keys are those of the page's colours."""

LEAST = 0.5
"""A cell disagrees with its baseline when the share of seeds that are right differs by that much."""


@dataclass(frozen=True)
class Disputed:
    """A question about which cells disagree.

    Attributes:
        suite, question: which.
        kind, asked, gold: of it.
        shares: cell -> (seeds that are right, seeds).
        gaps: cell -> its share less its baseline's.
    """

    suite: str
    question: str
    kind: str
    asked: str
    gold: str
    shares: Mapping[str, tuple[int, int]]
    gaps: Mapping[str, float]

    @property
    def verdict(self) -> str:
        """One of ``VERDICTS``."""
        up, down = max(self.gaps.values()), min(self.gaps.values())
        if up >= LEAST and down <= -LEAST:
            return "unparsed"
        return "right" if up >= LEAST else "wrong"


def disputed(study: Study, read: Read) -> list[Disputed]:
    """Questions that some cell answers otherwise than its baseline, those of the widest gap first."""
    found = []
    for suite in sorted(read.units):
        having = {
            key: files.suites[suite] for key, files in sorted(read.runs.items()) if suite in files.suites
        }
        ids = sorted(set.intersection(*(set(one.ids) for one in having.values())))
        if not ids:
            continue
        place = {name: i for i, name in enumerate(ids)}
        right = {}
        for key, one in having.items():
            row = np.full(len(ids), np.nan)
            for name, value in zip(one.ids, one.right, strict=True):
                if name in place:
                    row[place[name]] = value
            right[key] = row
        cells = {
            c: np.array([right[k] for k in having if k[0] == c]) for c in dict.fromkeys(k[0] for k in having)
        }
        judged = ~np.isnan(np.concatenate(list(cells.values()))).any(0)
        gaps = {}
        judged_as = [name for name in cells if study.cells[name].role in METHOD_ROLES] or list(cells)
        for name in judged_as:
            rows, against = cells[name], study.cells[name].matched_to
            if against in cells and not all(run.identical_to for run in study.cells[name].runs):
                gaps[name] = rows.mean(0) - cells[against].mean(0)
        if not gaps:
            continue
        widest = np.abs(np.array(list(gaps.values()))).max(0)
        for i in np.flatnonzero(judged & (widest >= LEAST)):
            record = read.records[suite][ids[i]]
            found.append(
                Disputed(
                    suite, ids[i], record["kind"], record["question"], record["gold"],
                    {c: (int(rows[:, i].sum()), len(rows)) for c, rows in cells.items()},
                    {c: float(gap[i]) for c, gap in gaps.items()},
                )
            )  # fmt: skip
    return sorted(
        found, key=lambda one: (-max(map(abs, one.gaps.values())), stable_hash(one.suite, one.question))
    )


def chosen(found: Sequence[Disputed], most: int) -> list[Disputed]:
    """At most ``most``, of each suite and verdict in turn."""
    queues: dict[tuple[str, str], list[Disputed]] = {}
    for one in found:
        queues.setdefault((one.suite, one.verdict), []).append(one)
    taken: list[Disputed] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        taken += [queues[key][turn] for key in sorted(queues) if turn < len(queues[key])]
        if len(taken) >= most:
            break
    return taken[:most]


def disagreement_wall(study: Study, read: Read, pictures: Pictures, most: int) -> Wall | None:
    """Cards of questions about which cells disagree; None: there are none."""
    every = disputed(study, read)
    if not every or not most:
        return None
    shown = chosen(every, most)
    drawn, first, cards = Thumbnails(), set(), []
    for number, one in enumerate(shown):
        record = {"suite": one.suite, "id": one.question}
        cards.append(_card(study, number, one, shots(record, pictures, drawn, first)))
    facts = [(one.suite, one.kind, one.verdict) for one in shown]
    told = (
        f"{count(len(shown))} of {count(len(every))} questions that some method answers otherwise than its baseline (in half of "
        f"the seeds or more; how many seeds are right is told), widest gaps first, suites and directions in turn. They are chosen for their gaps: chance alone fills "
        f"such a wall, so it shows what differs, not that something does."
    )
    html = join(
        tag("p", told, class_="about"),
        controls(facts, VERDICTS),
        tag("p", "No card fits these filters.", id="none", hidden=True),
        tag("ul", *cards, id="cards", class_="cards"),
    )
    return Wall(html, facts)


def _card(study: Study, number: int, one: Disputed, pictures: Sequence[Markup]) -> Markup:
    sign, word = VERDICTS[one.verdict]
    order = sorted(one.gaps, key=lambda name: (-abs(one.gaps[name]), name))
    shown = [name for name in order if abs(one.gaps[name]) >= LEAST][:6]
    baselines = list(dict.fromkeys(b for b in (study.cells[name].matched_to for name in shown) if b))
    rows: list[tuple[Any, Any]] = [("Gold", cut(one.gold))]
    rows += [(breakable(name), _share(one.shares[name])) for name in baselines]
    rows += [
        (breakable(name), join(_share(one.shares[name]), tag("small", plain(one.gaps[name], 2, sign=True))))
        for name in shown
    ]
    more = sum(abs(gap) >= LEAST for gap in one.gaps.values()) - len(shown)
    if more:
        rows.append(("", f"and {more} more cells"))
    return tag(
        "li",
        tag("article",
            tag("div", *pictures, class_="shots" if len(pictures) < 2 else "shots several") if pictures else None,
            tag("div",
                tag("p", tag("span", tag("b", sign, aria_hidden="true"), word, class_="verdict"),
                    tag("span", breakable(f"{one.suite} · {one.kind}"), class_="where"), class_="line"),
                tag("p", cut(words_of(one.asked)), class_="question", dir="auto", id=f"question-{number}"),
                tag("dl", *(tag("div", tag("dt", name), tag("dd", value, dir="auto")) for name, value in rows)),
                tag("p", one.question, class_="id"),
                class_="words"),
            aria_labelledby=f"question-{number}"),
        class_=f"card {one.verdict}",
    )  # fmt: skip


def _share(one: tuple[int, int]) -> str:
    return f"{one[0]} of {one[1]}"
