"""An oracle with its own grammar answers every question, from the facts and from their description in words.

It shares no code with the generator. Every "the ..." must denote exactly one object, and every answer must
follow.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.data.scenes import SPLITS, STYLES, SceneConfig, sample

SIZE, COLOUR = "small|large", "red|green|blue|yellow|purple|cyan|orange|gray"
SHAPE = "sphere|cube|cylinder|cone"
WHERE = "to the left of|to the right of|in front of|behind"
BARE = rf"(?:(?P<size{{0}}>{SIZE}) )?(?:(?P<colour{{0}}>{COLOUR}) )?(?P<noun{{0}}>{SHAPE}|object)s?"
PHRASE = re.compile(
    BARE.format("")
    + rf"(?: (?P<where>{WHERE}) the {BARE.format('2')}| (?P<place>on the left|in the middle|on the right))?"
)
OUTER = {"leftmost": ("x", 0), "rightmost": ("x", -1), "nearest": ("depth", 0), "farthest": ("depth", -1)}
SIDES = {
    "to the left of": ("x", -1),
    "to the right of": ("x", 1),
    "in front of": ("depth", -1),
    "behind": ("depth", 1),
}
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]
MARGIN = 0.06


@dataclass
class Facts:
    things: list[dict[str, Any]] = field(default_factory=list)
    sign: str | None = None
    bars: list[tuple[str, int]] = field(default_factory=list)
    exact: bool = False


def from_meta(meta: dict[str, Any]) -> Facts:
    things = []
    for o in meta["objects"]:
        edges = [abs(o["x"] - e) for e in (0.4, 0.6)]
        place = (
            None
            if min(edges) < 0.03
            else ("on the left", "in the middle", "on the right")[(o["x"] > 0.4) + (o["x"] > 0.6)]
        )
        things.append({**o, "place": place})
    return Facts(things, meta["sign"], [(b["colour"], b["value"]) for b in meta["chart"] or []], exact=True)


def from_words(text: str) -> Facts:
    """Read a description back."""
    facts = Facts()
    for part in re.findall(r"[^.]+\.", text):
        if sign := re.search(r"sign (?:says|is) (\w+)\.", part):
            facts.sign = sign[1]
        elif "chart" in part:
            facts.bars = [(c, int(v)) for c, v in re.findall(rf"({COLOUR}) (\d)", part)]
        elif re.fullmatch(r".* \d objects\.", part):
            continue
        elif order := re.findall(r"the (first|second|third|fourth|fifth|sixth)", part):
            axis, ascending = way(part)
            for rank, name in enumerate(order):
                facts.things[ORDINALS.index(name)][axis] = rank if ascending else -rank
        else:
            axis, ascending = way(part)
            item = rf"an? ({SIZE}) ({COLOUR}) ({SHAPE})(?: (on the left|in the middle|on the right))?"
            for rank, (size, colour, shape, place) in enumerate(re.findall(item, part)):
                thing = {
                    "size": size,
                    "colour": colour,
                    "shape": shape,
                    "place": place or None,
                    "depth": 0,
                    "x": 0,
                }
                thing[axis] = rank if ascending else -rank
                facts.things.append(thing)
    return facts


def way(part: str) -> tuple[str, bool]:
    part = part.strip().lower()
    starts = {
        "from left": ("x", True),
        "from right": ("x", False),
        "from near": ("depth", True),
        "from far": ("depth", False),
    }
    return next((v for k, v in starts.items() if part.startswith(k)), ("x", True))


def differ(facts: Facts, a: dict[str, Any], b: dict[str, Any], axis: str) -> float:
    gap = a[axis] - b[axis]
    assert abs(gap) >= (MARGIN - 1e-3 if facts.exact else 1), "a comparison without a margin"
    return gap


def fitting(facts: Facts, phrase: str) -> list[dict[str, Any]]:
    match = PHRASE.fullmatch(phrase)
    assert match, phrase
    got = match.groupdict()

    def fits(thing: dict[str, Any], n: str) -> bool:
        return (
            got["size" + n] in (None, thing["size"])
            and got["colour" + n] in (None, thing["colour"])
            and got["noun" + n] in ("object", thing["shape"])
        )

    found = [t for t in facts.things if fits(t, "")]
    if got["place"]:
        assert all(t["place"] for t in found), "a place too close to call"
        found = [t for t in found if t["place"] == got["place"]]
    if got["where"]:
        anchors = [t for t in facts.things if fits(t, "2")]
        assert len(anchors) == 1, f"{phrase}: {len(anchors)} anchors"
        axis, sign = SIDES[got["where"]]
        found = [t for t in found if t is not anchors[0] and differ(facts, t, anchors[0], axis) * sign > 0]
    return found


def the(facts: Facts, phrase: str) -> dict[str, Any]:
    word, _, rest = phrase.partition(" ")
    if word in OUTER:
        axis, end = OUTER[word]
        found = sorted(fitting(facts, rest), key=lambda t: t[axis])
        assert len(found) > 1, f"{phrase}: nothing to choose from"
        for i in range(1, len(found)):
            differ(facts, found[i - 1], found[i], axis)
        return found[end]
    found = fitting(facts, phrase)
    assert len(found) == 1, f"{phrase}: denotes {len(found)} objects"
    return found[0]


def solve(facts: Facts, question: str) -> tuple[str, list[dict[str, Any]] | None]:
    """Answer and the objects it is about."""

    def match(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, question)

    if facts.bars:
        return solve_chart(facts.bars, question), None
    if m := match(r"What (colour|shape|size) is the (.+)\?") or match(
        r"Which (colour|shape|size) does the (.+) have\?"
    ):
        thing = the(facts, m[2])
        return thing[m[1]], [thing]
    if m := match(r"Is the (.+) small or large\?"):
        thing = the(facts, m[1])
        return thing["size"], [thing]
    if m := match(r"(?:Is there|Do you see) an? (.+)\?"):
        found = fitting(facts, m[1])
        return ("yes" if found else "no"), found
    if m := match(r"How many (.+) are not (.+)\?"):
        noun = "object" if m[2] in f"{SIZE}|{COLOUR}".split("|") else m[2].removesuffix("s")
        out = fitting(facts, f"{m[2]} object" if noun == "object" else noun)
        found = [t for t in fitting(facts, m[1].removesuffix("s")) if t not in out]
        return str(len(found)), found
    if m := match(r"How many (.+) (?:are there|do you see)\?"):
        found = fitting(facts, m[1].removesuffix("s"))
        return str(len(found)), found
    if m := match(rf"How many (.+) are ((?:{WHERE}) the .+)\?"):
        found = fitting(facts, f"{m[1].removesuffix('s')} {m[2]}")
        return str(len(found)), found
    if m := match(r"Is the (.+) to the left or to the right of the (.+)\?"):
        a, b = the(facts, m[1]), the(facts, m[2])
        return ("left" if differ(facts, a, b, "x") < 0 else "right"), [a, b]
    if m := match(r"Is the (.+) nearer or farther than the (.+)\?"):
        a, b = the(facts, m[1]), the(facts, m[2])
        return ("nearer" if differ(facts, a, b, "depth") < 0 else "farther"), [a, b]
    m = match(r"(?:What does the sign|Which word is on the sign)(?: behind the (.+?))?(?: say)?\?")
    assert m and facts.sign, question
    if m[1]:
        the(facts, m[1])
    return facts.sign, None


def solve_chart(bars: list[tuple[str, int]], question: str) -> str:
    values, order = dict(bars), [c for c, _ in bars]
    if m := re.search(r"the (tallest|shortest) bar", question):
        return (max if m[1] == "tallest" else min)(bars, key=lambda b: b[1])[0]
    if m := re.search(r"the bar to the (left|right) of the (\w+) bar", question):
        at = order.index(m[2]) + (1 if m[1] == "right" else -1)
        assert at >= 0
        return order[at] if "colour" in question else str(values[order[at]])
    if m := re.search(r"Is the (\w+) bar taller or shorter than the (\w+) bar", question):
        return "taller" if values[m[1]] > values[m[2]] else "shorter"
    if question == "How many bars are there?":
        return str(len(bars))
    m = re.search(r"the (\w+) bar\?", question)
    assert m, question
    return str(values[m[1]])


def exchanges(record: dict[str, Any]) -> list[tuple[str, str]]:
    talk = [t["value"] for t in record["conversations"]]
    return [
        (q.split("\n")[-1].removesuffix(" Answer briefly."), a)
        for q, a in zip(talk[::2], talk[1::2], strict=True)
    ]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("split", SPLITS)
def test_the_oracle_agrees_with_every_answer(split, style):
    config = SceneConfig(style=style, objects=(1, 4))
    check(config, 2, split, range(60))


@settings(max_examples=15, deadline=None)
@given(
    split=st.sampled_from(SPLITS),
    style=st.sampled_from(STYLES),
    high=st.integers(1, 6),
    seed=st.integers(0, 2**40),
    questions=st.integers(1, 8),
)
def test_the_oracle_agrees_whatever_the_settings(split, style, high, seed, questions):
    config = SceneConfig(style=style, objects=(1, high), questions=questions, sign=0.5)
    check(config, seed, split, range(8))


def check(config: SceneConfig, seed: int, split: str, indices: range) -> None:
    for index in indices:
        record = sample(config, seed, split, index, "text")
        exact = from_meta(record["meta"])
        told = from_words(record["conversations"][0]["value"].split("\n")[0])
        assert len(told.things) == len(exact.things) and told.bars == exact.bars and told.sign == exact.sign
        for (question, answer), asked in zip(exchanges(record), record["meta"]["asked"], strict=True):
            found, about = solve(exact, question)
            assert found == answer, (question, record["meta"]["objects"])
            assert solve(told, question)[0] == answer, (question, record["conversations"][0]["value"])
            if about is not None:
                assert sorted(asked) == sorted(exact.things.index(t) for t in about), question


def test_captions_name_every_object():
    config = SceneConfig(charts=0.2, sign=0.5)
    for index in range(150):
        record = sample(config, 2, "uniform", index, "text_caption")
        text, meta = record["conversations"][1]["value"], record["meta"]
        named = re.findall(rf"({SIZE}) ({COLOUR}) ({SHAPE})", text)
        assert sorted(named) == sorted((o["size"], o["colour"], o["shape"]) for o in meta["objects"])
        assert re.findall(rf"({COLOUR}) (\d)", text) == [
            (b["colour"], str(b["value"])) for b in meta["chart"] or []
        ]
        assert (meta["sign"] in text.split()[-1]) if meta["sign"] else "sign" not in text


def test_grounded_questions_say_more_than_thin_ones():
    words = {}
    for style in STYLES:
        config = SceneConfig(style=style)
        texts = [q for i in range(300) for q, _ in exchanges(sample(config, 2, "train", i, "text"))]
        words[style] = len(set(texts)) / len(texts)
    assert words["grounded"] > 2 * words["thin"]
