"""The wall of pictures: which answers are shown, and a card for each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.schema import IMAGE_MARK, stable_hash
from ...models.errors import UserError
from .markup import Markup, breakable, join, tag
from .numbers import count
from .thumbnails import Thumbnail, Thumbnails

Record = Mapping[str, Any]
Pictures = Callable[[str, str], Sequence[bytes]]
"""(suite, id) -> the encoded pictures of a question."""

VERDICTS = {
    "right": ("✓", "Right"),
    "wrong": ("✗", "Wrong"),
    "unparsed": ("?", "Unparsed"),
    "open": ("·", "Not judged"),
}
"""What became of an answer: a sign and a word, so that colour alone never tells it."""

LONGEST = 700
"""Letters of a question or an answer on a card."""


def verdict(record: Record) -> str:
    """``right``, ``wrong``, ``unparsed`` (no reading, or never asked) or ``open`` (the scorer marks no single answer).

    Raises:
        UserError: the prediction is not marked.
    """
    if "parsed" not in record or "right" not in record:
        raise UserError(
            f"report: prediction {record.get('suite')}, {record.get('id')} is not marked; score it first"
        )
    if record["right"] is None:
        return "open"
    if record["right"]:
        return "right"
    return "unparsed" if record["parsed"] is None else "wrong"


def chosen(records: Iterable[Record], most: int, suites: Sequence[str] = ()) -> list[Record]:
    """At most ``most`` predictions, the same for the same predictions in any order.

    One of each suite, kind and verdict in turn, within each by a hash of the id: rare kinds and rare mistakes are seen.

    Returns:
        by suite (in the order of ``suites``), then by the hash: kinds and verdicts are mixed.
    """
    strata: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        strata.setdefault((record["suite"], record["kind"], verdict(record)), []).append(record)
    queues = [sorted(strata[key], key=_drawn) for key in sorted(strata)]
    taken: list[Record] = []
    for turn in range(max(map(len, queues), default=0)):
        taken += [queue[turn] for queue in queues if turn < len(queue)]
        if len(taken) >= most:
            break
    order = {name: at for at, name in enumerate(suites)}
    return sorted(taken[:most], key=lambda r: (order.get(r["suite"], len(order)), r["suite"], _drawn(r)))


def _drawn(record: Record) -> tuple[int, str]:
    return stable_hash(record["suite"], record["id"]), record["id"]


@dataclass(frozen=True)
class Wall:
    """The built wall.

    Attributes:
        html: of all of it.
        cards: (suite, kind, verdict) of each card, for the filters.
    """

    html: Markup
    cards: list[tuple[str, str, str]]


def wall(records: Sequence[Record], pictures: Pictures, most: int, suites: Sequence[str] = ()) -> Wall:
    """Cards of some predictions, under the controls that filter them.

    Raises:
        UserError: a prediction is not marked.
    """
    shown = chosen(records, most, suites)
    drawn, first, cards = Thumbnails(), set(), []
    for number, record in enumerate(shown):
        cards.append(_card(number, record, shots(record, pictures, drawn, first)))
    facts = [(record["suite"], record["kind"], verdict(record)) for record in shown]
    told = (
        f"{count(len(shown))} of {count(len(records))} answers, taken in turn from every suite, kind and verdict by a hash of"
        " their ids. Rare mistakes are seen that way, so the share of right cards here is not the model’s score."
    )
    return Wall(
        join(
            tag("p", told, class_="about"),
            controls(facts, VERDICTS),
            tag("p", "No card fits these filters.", id="none", hidden=True),
            tag("ul", *cards, id="cards", class_="cards"),
        ),
        facts,
    )


def controls(facts: Sequence[tuple[str, str, str]], verdicts: Mapping[str, tuple[str, str]]) -> Markup:
    """Filters of cards, hidden until the script that makes them work runs; it fills in suites and kinds.

    Args:
        facts: (suite, kind, verdict) of each card.
        verdicts: verdict -> its sign and its word.
    """
    seen = Counter(fact[2] for fact in facts)
    choices = [("", "All", len(facts))]
    choices += [(key, f"{sign} {word}", seen[key]) for key, (sign, word) in verdicts.items() if seen[key]]
    radios = [
        tag(
            "label",
            tag("input", type="radio", name="verdict", value=key, checked=key == ""),
            tag("span", word, " ", tag("small", count(n))),
        )
        for key, word, n in choices
    ]
    return tag(
        "form",
        tag("label", "Suite", tag("select", tag("option", "All suites", value=""), id="suite")),
        tag("label", "Kind", tag("select", tag("option", "All kinds", value=""), id="kind")),
        tag("label", "Search", tag("input", type="search", id="search", placeholder="question, answer, id", autocomplete="off")),
        tag("fieldset", tag("legend", "Answer"), *radios),
        tag("div", tag("output", id="count", for_="suite kind search", aria_live="polite"),
            tag("button", "Clear filters", type="reset"), class_="found"),
        id="filters", class_="filters", hidden=True, aria_label="Filter the pictures",
    )  # fmt: skip


def shots(record: Record, pictures: Pictures, drawn: Thumbnails, first: set[int]) -> list[Markup]:
    """The pictures of a card. A copy is written where it is first shown; later cards name it, the script fills them in."""
    try:
        numbers = [drawn.number(encoded) for encoded in pictures(record["suite"], record["id"])]
    except (UserError, OSError) as error:
        return [tag("p", f"No picture: {error}", class_="missing")]
    shots = []
    for at, number in enumerate(numbers):
        made: Thumbnail = drawn.made[number]
        (width, height), (full, tall) = made.size, made.original
        alt = f"Picture {at + 1} of {len(numbers)}, {full} × {tall} pixels"
        known = number in first
        first.add(number)
        shots.append(
            tag("img", src=None if known else made.uri, id=None if known else f"picture-{number}",
                data_same=f"picture-{number}" if known else None, alt=alt, width=width, height=height,
                class_=made.shown_as)
        )  # fmt: skip
    return shots


def _card(number: int, record: Record, shots: Sequence[Markup]) -> Markup:
    key = verdict(record)
    sign, word = VERDICTS[key]
    said, parsed = str(record["output"]).strip(), record["parsed"]
    rows = [("Gold", cut(str(record["gold"]))), ("Model", cut(said) if said else tag("em", "nothing"))]
    if record.get("error"):
        rows[1] = ("Model", tag("em", f"not asked: {cut(str(record['error']))}"))
    elif parsed is not None and _bare(str(parsed)) != _bare(said):
        rows.append(("Read as", cut(str(parsed))))
    answers = [tag("div", tag("dt", name), tag("dd", value, dir="auto")) for name, value in rows]
    where = f"{record['suite']} · {record['kind']}"
    return tag(
        "li",
        tag("article",
            tag("div", *shots, class_="shots" if len(shots) < 2 else "shots several") if shots else None,
            tag("div",
                tag("p", tag("span", tag("b", sign, aria_hidden="true"), word, class_="verdict"),
                    tag("span", breakable(where), class_="where"), class_="line"),
                tag("p", cut(words_of(record.get("question", ""))), class_="question", dir="auto", id=f"question-{number}"),
                tag("dl", *answers),
                tag("p", record["id"], class_="id"),
                class_="words"),
            aria_labelledby=f"question-{number}"),
        class_=f"card {key}",
    )  # fmt: skip


def _bare(words: str) -> str:
    """An answer without what a scorer may read over: nobody needs to be told that ``Red.`` was read as ``red``."""
    return words.strip(" .").casefold()


def words_of(question: str) -> str:
    """A question as it is read beside its picture: a single image mark goes, several are numbered."""
    marks = question.count(IMAGE_MARK)
    if marks == 1:
        return question.replace(IMAGE_MARK, "").strip()
    numbers = iter(range(1, marks + 1))
    return re.sub(re.escape(IMAGE_MARK), lambda _: f"[picture\u00a0{next(numbers)}]", question).strip()


def cut(words: str) -> str:
    """As much of a text as a card has room for."""
    return (
        words
        if len(words) <= LONGEST
        else f"{words[:LONGEST]} … ({count(len(words) - LONGEST)} more letters)"
    )
