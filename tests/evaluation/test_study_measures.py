"""Every measure as a function of sums is the scorer's own number, and which questions hang together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opsin.evaluation.scorers import make
from opsin.evaluation.study.measures import form
from opsin.evaluation.study.pictures import Units, keep_pictures, kept_pictures, read_index
from opsin.models.errors import UserError

from studies import suite_items, wrong


def answered(name: str, samples: int, seed: int = 0) -> list[dict[str, Any]]:
    """Predictions of scenes, six in ten right, some of them unreadable or never asked."""
    rng = np.random.default_rng(seed)
    records = []
    for item in suite_items(name, samples):
        drawn = rng.random()
        output = item.gold if drawn < 0.6 else wrong(item) if drawn < 0.9 else ""
        records.append({"suite": name, "id": item.id, "kind": item.kind, "gold": item.gold, "question": item.question,
                        "choices": list(item.choices), "output": output, "meta": dict(item.meta)})  # fmt: skip
        if drawn > 0.97:
            records[-1]["error"] = "too long"
    return records


def made(
    golds: Sequence[str], metas: Sequence[dict[str, Any]], kinds: Sequence[str], said: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {
            "suite": "s",
            "id": str(i),
            "kind": kind,
            "gold": gold,
            "question": "?",
            "choices": [],
            "output": words,
            "meta": meta,
        }
        for i, (gold, meta, kind, words) in enumerate(zip(golds, metas, kinds, said, strict=True))
    ]


def yes_no(n: int, seed: int) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    return (
        ["yes" if x < 0.5 else "no" for x in rng.random(n)],
        ["yes" if x < 0.6 else "no" if x < 0.9 else "who knows" for x in rng.random(n)],
    )


def suites() -> dict[str, tuple[str, list[dict[str, Any]]]]:
    gold, said = yes_no(90, 1)
    splits = [("random", "popular", "adversarial")[i % 3] for i in range(90)]
    letters = ["ABCD"[i % 4] for i in range(90)]
    picked = [letter if i % 3 else "B" for i, letter in enumerate(letters)]
    options = {"options": ["a", "b", "c", "d"]}
    sources = [{"source": ("ADE20K", "COCO", "Omni3D")[i % 3], **options} for i in range(90)]
    rolled = [{"index": i // 4 + (i % 4) * 10**6, **options} for i in range(88)] + [
        {"index": 500, **options},
        {"index": 501, **options},
    ]
    figures = [
        {"category": ("VS", "VD")[i % 2], "subcategory": "map", "set_id": i // 12, "figure_id": i // 3 % 4, "question_id": i % 3}
        for i in range(90)
    ]  # fmt: skip
    exists = [{"split": f"exists_{split}"} for split in splits]
    return {
        "pairs of scenes": ("scenes", answered("minimal_pairs", 120)),
        "an incomplete pair": ("scenes", answered("minimal_pairs", 120)[1:]),
        "aligned and conflict": ("scenes", answered("conflict", 60)),
        "existence in scenes": ("scenes", made(gold, exists, splits, said)),
        "captions": ("scene_captions", answered("captions", 60)),
        "pope": ("pope", made(gold, [{"split": s} for s in splits], splits, said)),
        "pope_read": ("pope_read", made(gold, [{"split": s} for s in splits], splits, said)),
        "cv_bench": ("cv_bench", made(letters, sources, ["Count"] * 90, picked)),
        "mmbench": ("mmbench", made(letters, rolled, ["all"] * 90, picked)),
        "mmvp": ("mmvp", made(letters, [{"pair": i // 2, **options} for i in range(90)], ["all"] * 90, picked)),
        "hallusion_bench": ("hallusion_bench", made(gold, figures, ["VS/map"] * 90, said)),
        "exact": ("exact_relaxed", made(letters, [{}] * 90, ["all"] * 90, picked)),
    }  # fmt: skip


SUITES = suites()
NOT_RESAMPLED = {
    "incomplete_pairs",
    "incomplete_questions",
    "pair_chance",
    "chance",
    "majority",
    "gold_yes_ratio",
    "fAcc_without_VS_0",
}
"""Facts of a suite, the same whatever is answered."""


@pytest.mark.parametrize("name", SUITES)
def test_measures_are_the_scorers(name: str) -> None:
    scorer_name, records = SUITES[name]
    scorer = make(scorer_name)
    marked, scores = scorer.score(records)
    held = 0
    for measure, expected in scores.measures.items():
        if measure.removeprefix("exists/") in NOT_RESAMPLED:
            continue
        shape = form(scorer, measure)
        columns = shape.columns(marked, scorer)
        assert columns.shape[0] == len(records)
        value = float(shape.value(columns.sum(0)))
        if expected.value is None:
            assert np.isnan(value), measure
        else:
            assert value == pytest.approx(expected.value, abs=1e-12), measure
            held += 1
            if measure not in ("f1", "exists/f1") and not measure.endswith("mean_of_splits"):
                assert shape.count(columns.sum(0)) == expected.n, measure
        assert shape.unit == expected.unit
    assert held >= 2


def test_a_likelihood_is_told_or_that_of_the_right_choice() -> None:
    records = [
        {"gold": "red", "nll": 0.5}, {"gold": "red", "logprobs": {"red": {"sum": -2.0, "tokens": 1}, "blue": {"sum": -3.0, "tokens": 1}}},
        {"gold": "red"}, {"gold": "red", "nll": float("nan")},
    ]  # fmt: skip
    shape = form(make("exact"), "nll")
    columns = shape.columns(records, make("exact"))
    assert columns.tolist() == [[0.5, 1], [2.0, 1], [0, 0], [0, 0]]
    assert shape.value(columns.sum(0)) == 1.25
    assert (shape.unit, shape.better) == ("nats", -1)


def test_a_measure_that_is_none_of_its_scorer_is_refused() -> None:
    with pytest.raises(UserError, match=r"scorer scenes: no measure 'pair_acuracy'.*pair_accuracy"):
        form(make("scenes"), "pair_acuracy")
    with pytest.raises(UserError, match="scorer exact: no measure 'pair_accuracy/colour'"):
        form(make("exact"), "pair_accuracy/colour")


def records_of(*rows: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": name, "meta": meta} for name, meta in rows]


def test_questions_about_one_picture_are_one_unit() -> None:
    scenes = {"source": "scenes", "objects": []}
    units = Units(
        records_of(
            ("scenes/uniform/18/000000/0", scenes), ("scenes/uniform/18/000000/1", scenes),
            ("scenes/uniform/18/000001/0", scenes), ("scenes/conflict/18/000001/0", scenes),
            ("scenes/minimal_pairs/18/000002/0", {**scenes, "pair": 1}), ("scenes/minimal_pairs/18/000003/0", {**scenes, "pair": 1}),
        ),
        "scenes", {},
    )  # fmt: skip
    assert len(units) == 3 and units.by_picture
    assert units.of("scenes/uniform/18/000000/0") == units.of("scenes/uniform/18/000000/1")
    assert units.of("scenes/uniform/18/000001/0") == units.of("scenes/conflict/18/000001/0")  # twins
    assert units.of("scenes/minimal_pairs/18/000002/0") == units.of("scenes/minimal_pairs/18/000003/0")
    named = Units(
        records_of(("1", {"image": "a.jpg"}), ("2", {"image": "a.jpg"}), ("3", {"image": "b.jpg"})),
        "pope",
        {},
    )
    assert len(named) == 2 and named.by_picture
    unknown = Units(records_of(("1", {}), ("2", {})), "pope", {})
    assert len(unknown) == 2 and not unknown.by_picture
    digests = {"1": ["x"], "2": ["x", "y"], "3": ["y"], "4": []}
    kept = Units(records_of(("1", {}), ("2", {}), ("3", {}), ("4", {})), "pope", digests)
    assert len(kept) == 2 and kept.by_picture
    rolled = Units(
        records_of(("1", {"index": 7}), ("2", {"index": 7 + 10**6}), ("3", {"index": 8})), "mmbench", {}
    )
    assert len(rolled) == 2
    sets = [
        {"category": "VS", "subcategory": "map", "set_id": s, "figure_id": f}
        for s, f in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(Units(records_of(*((str(i), m) for i, m in enumerate(sets))), "hallusion_bench", {})) == 2


def test_pictures_are_kept_once_and_found_again(tmp_path: Path) -> None:
    keep_pictures(tmp_path, "a", [("1", [b"x"]), ("2", [b"x", b"y"])])
    keep_pictures(tmp_path, "b", [("1", [b"y"])])
    index = read_index(tmp_path)
    assert kept_pictures(tmp_path, index, "a", "2") == [b"x", b"y"]
    assert kept_pictures(tmp_path, index, "b", "1") == [b"y"]
    assert len(list((tmp_path / "pictures").iterdir())) == 3
    with pytest.raises(UserError, match="the study kept none"):
        kept_pictures(tmp_path, index, "b", "2")
    (tmp_path / "pictures/index.json").write_text('{"a": {"1": ["../../etc/passwd"]}}')
    with pytest.raises(UserError, match="no name of a picture"):
        read_index(tmp_path)
