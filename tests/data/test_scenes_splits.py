"""Statistics of the splits: skew, held-out pairs, twins, pairs, and what can be guessed without looking."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from opsin.data.scenes import COLOURS, SHAPES, STYLES, SceneConfig, build_world, sample

TRAIN, TEST = 2400, 1200
CHANCE = {
    # kind: chance of a guess, averaged over its question forms (see the docstring of opsin.data.scenes)
    "colour": 1 / 8,
    "shape": 1 / 4,
    "size": 1 / 2,
    "count": 1 / 3,
    "exists": 1 / 2,
    "selection": (1 / 8 + 1 / 4 + 1 / 2) / 3,
    "comparison": 1 / 2,
    "sign": 1 / 14,
    "chart": 0.25,
    "two_hop": (1 / 8 + 1 / 4 + 1 / 2) / 3,
    "negated_count": 0.3,
}


def records(config: SceneConfig, seed: int, split: str, n: int, stream: str = "text") -> list[dict[str, Any]]:
    """Text twins: the same questions without the cost of pictures."""
    return [sample(config, seed, split, i, stream) for i in range(n)]


def exchanges(records: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(kind, question, answer) of all records."""
    found = []
    for record in records:
        talk = [t["value"] for t in record["conversations"]]
        for kind, question, answer in zip(record["meta"]["kinds"], talk[::2], talk[1::2], strict=True):
            found.append((kind, question.split("\n")[-1].removesuffix(" Answer briefly."), answer))
    return found


def skeleton(question: str) -> str:
    """The question without what describes objects."""
    return re.sub(
        rf"\b({'|'.join((*COLOURS, *SHAPES, *(s + 's' for s in SHAPES)))}|small|large|objects?)\b(?! or)",
        "_",
        question,
    )


class Blind:
    """Most frequent answer of ``train`` to the question's words, else to its skeleton, else to its kind."""

    def __init__(self, train: list[tuple[str, str, str]]) -> None:
        self.tables: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for kind, question, answer in train:
            for key in (question, skeleton(question), kind):
                self.tables[key][answer] += 1

    def answer(self, kind: str, question: str) -> str:
        key = next((k for k in (question, skeleton(question), kind) if k in self.tables), None)
        return self.tables[key].most_common(1)[0][0] if key else ""

    def accuracy(self, test: list[tuple[str, str, str]]) -> dict[str, tuple[float, int]]:
        hits: defaultdict[str, list[bool]] = defaultdict(list)
        for kind, question, answer in test:
            hits[kind].append(self.answer(kind, question) == answer)
        return {kind: (sum(h) / len(h), len(h)) for kind, h in sorted(hits.items())}


@pytest.fixture(scope="module", params=STYLES)
def config(request):
    return SceneConfig(style=request.param)


@pytest.fixture(scope="module")
def train(config):
    return records(config, 17, "train", TRAIN)


@pytest.fixture(scope="module")
def blind(config, train):
    return Blind(exchanges(train) + exchanges(records(config, 17, "train", 1000, "text_skill")))


def test_guessing_without_looking_is_at_chance_on_uniform(config, blind):
    scores = blind.accuracy(exchanges(records(config, 18, "uniform", TEST)))
    scores |= blind.accuracy(exchanges(records(config, 18, "text_skill", TEST // 2)))
    assert set(scores) == set(CHANCE)
    for kind, (score, n) in scores.items():
        assert score < CHANCE[kind] + 0.02 + 3 * math.sqrt(CHANCE[kind] * (1 - CHANCE[kind]) / n), (
            kind,
            score,
            n,
        )


def test_train_has_the_skew_and_the_prior_pays_there(config, train, blind):
    world = build_world(config.world, config.held_out)
    objects = [o for r in train for o in r["meta"]["objects"]]
    for shape in SHAPES:
        colours = Counter(o["colour"] for o in objects if o["shape"] == shape)
        n = colours.total()
        share = colours[world.prior[shape]] / n
        assert abs(share - config.skew) < 4 * math.sqrt(config.skew * (1 - config.skew) / n), (shape, share)
    seen = {(o["colour"], o["shape"]) for o in objects}
    assert seen == {(c, s) for c in COLOURS for s in SHAPES} - world.held_out
    fresh = blind.accuracy(exchanges(records(config, 19, "train", TEST // 2)))
    assert fresh["colour"][0] > 0.45 and fresh["shape"][0] > 0.4  # against .125 and .25 on uniform


def test_companions_stand_together_in_train_only(config, train):
    world = build_world(config.world, config.held_out)
    shares = []
    for scenes in (train, records(config, 18, "uniform", 800)):
        several = [
            [o["shape"] for o in r["meta"]["objects"]] for r in scenes if len(r["meta"]["objects"]) > 1
        ]
        shares.append(
            sum(any(world.companion[s] in shapes for s in shapes) for shapes in several) / len(several)
        )
    assert shares[0] > shares[1] + 0.2


def test_held_out_pairs_are_neither_shown_nor_named_in_train(config, train):
    world = build_world(config.world, config.held_out)
    assert len(world.held_out) == config.held_out and not world.held_out & {
        (c, s) for s, c in world.prior.items()
    }
    named = [f"{c} {s}" for c, s in world.held_out]
    skills = records(config, 17, "train", 500, "text_skill")
    captions = records(config, 17, "train", 300, "text_caption")
    for record in train + skills + captions:
        for turn in record["conversations"]:
            assert not any(pair in turn["value"] for pair in named), turn["value"]
            denied = re.search(r"How many (\w+)s are not (\w+)\?", turn["value"])
            assert not denied or (denied[2], denied[1]) not in world.held_out
    for record in records(config, 18, "held_out_pairs", 300):
        assert set(record["meta"]["kinds"]) <= {"colour", "shape"}
        for (asked,) in record["meta"]["asked"]:
            thing = record["meta"]["objects"][asked]
            assert (thing["colour"], thing["shape"]) in world.held_out


def test_conflict_and_aligned_are_twins_about_the_prior(config, blind):
    world = build_world(config.world, config.held_out)
    conflict, aligned = (records(config, 18, s, 300) for s in ("conflict", "aligned"))
    for one, other in zip(conflict, aligned, strict=True):
        ((asked,),) = one["meta"]["asked"]
        shape = one["meta"]["objects"][asked]["shape"]
        (c,), (a,) = exchanges([one]), exchanges([other])
        assert (
            c[1] == a[1]
            and a[2] == world.prior[shape] == one["meta"]["prior"][0] == other["meta"]["prior"][0]
        )
        assert c[2] != a[2] and (c[2], shape) not in world.held_out
        first, second = (r["meta"]["objects"] for r in (one, other))
        second[asked]["colour"] = c[2]
        assert first == second
    low, high = (blind.accuracy(exchanges(r))["colour"][0] for r in (conflict, aligned))
    assert low < 0.15 and high > 0.45


def test_minimal_pairs_differ_in_one_fact_and_cannot_be_guessed(config, blind):
    pairs = records(config, 18, "minimal_pairs", 360)
    right, facts = 0, Counter()
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        (a,), (b,) = exchanges([one]), exchanges([other])
        assert a[:2] == b[:2] and a[2] != b[2]
        assert one["meta"]["pair"] == other["meta"]["pair"] and one["meta"]["fact"] == other["meta"]["fact"]
        assert one["meta"]["sign"] == other["meta"]["sign"]
        facts[one["meta"]["fact"]] += 1
        right += blind.answer(*a[:2]) == a[2] and blind.answer(*b[:2]) == b[2]
        check_one_fact(one["meta"]["fact"], one["meta"]["objects"], other["meta"]["objects"])
    assert right == 0
    assert set(facts.values()) == {30} and len(facts) == 6
    assert len({r["meta"]["pair"] for r in pairs}) == 180
    first = Counter(
        exchanges(pairs[::2])[i][2] for i in range(180) if pairs[2 * i]["meta"]["fact"] == "existence"
    )
    assert min(first["yes"], first["no"]) > 4  # which of the two comes first says nothing


def check_one_fact(fact: str, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    keys = ("shape", "colour", "size", "x", "depth")
    one, other = ([tuple(o[k] for k in keys) for o in objects] for objects in (a, b))
    if fact in ("count", "existence"):
        less, more = sorted((one, other), key=len)
        assert len(more) == len(less) + 1 and [o for o in more if o in less] == less
        return
    changed = [(x, y) for x, y in zip(one, other, strict=True) if x != y]
    assert len(changed) == 1
    where = [k for k, x, y in zip(keys, *changed[0], strict=True) if x != y]
    assert len(where) == 1 and (where[0] == fact or (fact == "position" and where[0] in ("x", "depth")))


@pytest.mark.parametrize("split", ["exists_random", "exists_popular", "exists_adversarial"])
def test_pope_splits_are_balanced_and_their_negatives_are_as_named(config, blind, split):
    world = build_world(config.world, config.held_out)
    popular = absent = together = 0
    test = records(config, 18, split, 400)
    for record in test:
        shown = {(o["colour"], o["shape"]) for o in record["meta"]["objects"]}
        answers = Counter(a for _, _, a in exchanges([record]))
        assert answers["yes"] == answers["no"] > 0
        for _, question, answer in exchanges([record]):
            pair = tuple(question.rstrip("?").split()[-2:])
            assert (pair in shown) == (answer == "yes")
            if answer == "no":
                absent += 1
                assert pair not in world.held_out
                popular += world.prior[pair[1]] == pair[0]
                shapes = {s for _, s in shown}
                together += bool(shapes & {world.companion[pair[1]]}) or any(
                    world.companion[s] == pair[1] for s in shapes
                )
    if split == "exists_random":
        assert 0.05 < popular / absent < 0.3
    else:
        assert popular / absent > 0.99
    if split == "exists_adversarial":
        assert together / absent > 0.95
    score, n = blind.accuracy(exchanges(test))["exists"]
    assert abs(score - 0.5) < 0.16, (score, n)  # by chance only: see the next test


def test_yes_and_no_are_as_likely_for_frequent_pairs_as_for_rare_ones(config, train):
    world = build_world(config.world, config.held_out)
    answers: defaultdict[bool, Counter[str]] = defaultdict(Counter)
    for kind, question, answer in exchanges(train):
        if kind == "exists":
            colour, shape = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", question)[0]
            answers[world.prior[shape] == colour][answer] += 1
    for counts in answers.values():
        n = counts.total()
        assert abs(counts["yes"] / n - 0.5) < 0.02 + 3 * 0.5 / math.sqrt(n), answers
