"""``report.html`` without a browser: its numbers, tables, wall and pictures, its size, and that it is always the same."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.evaluation.report import markup, numbers, tables, wall
from opsin.evaluation.scorers.base import Measure, mean, share
from opsin.models.errors import UserError

from report_pages import Page, Reader, in_turn, scene_items


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(
        {
            "scenes": ("general", scene_items("uniform", 70), in_turn),
            "pope_a": ("hallucination", scene_items("exists_popular", 5), lambda at, item: "yes"),
            "pope_b": ("hallucination", scene_items("exists_random", 5), lambda at, item: item.gold),
        }
    )


def test_the_same_answers_in_any_order_give_the_same_bytes(page: Page, tmp_path: Path) -> None:
    shuffled = page.records.copy()
    random.Random(0).shuffle(shuffled)
    first = page.write(tmp_path / "a.html")
    assert page.write(tmp_path / "new" / "b.html", records=shuffled) == first
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [
        "a.html"
    ]  # nothing is left beside it


def test_it_is_well_formed_and_small_and_its_numbers_can_be_read_by_programs(
    page: Page, tmp_path: Path
) -> None:
    text = page.write(tmp_path / "r.html", baseline=page.scores)
    read = Reader(text)
    assert read.tags["article"] == 200
    assert read.tags["h1"] == read.tags["html"] == read.tags["main"] == 1
    assert len(text) < 1_000_000  # 200 cards of pictures of 64 pixels
    data = json.loads(read.scripts[0])
    assert data["scores"]["suites"] == page.scores["suites"]
    assert len(data["cards"]) == 200
    bare = re.sub(r'"data:image/[^"]*"', "", text.replace(read.scripts[0], ""))
    assert not re.search(r"https?:|//[a-z]", bare)  # nothing elsewhere is even named


def test_the_policy_allows_its_own_style_and_script_by_hash(page: Page, tmp_path: Path) -> None:
    text = page.write(tmp_path / "r.html", wall=4)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    for name, rule in (("style", "style-src"), ("script", "script-src")):
        content = text.split(f"<{name}>")[1].split(f"</{name}>")[0]
        assert (
            rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
        )
    assert not re.search(r"<[^>]+ (style|on[a-z]+)=", text)  # which the policy would refuse


def test_scores_stand_with_error_interval_n_blind_row_and_baseline(page: Page, tmp_path: Path) -> None:
    suites = json.loads(json.dumps(page.scores["suites"]))
    old = json.loads(json.dumps(suites))
    suites["pope_a"]["measures"]["accuracy"] = share([True] * 56 + [False] * 14).as_dict()
    suites["pope_a"]["errors"] = 3
    old["pope_a"]["measures"]["accuracy"] = share([True] * 48 + [False] * 32).as_dict()
    old["scenes"]["scorer"] = "another/1"
    del old["pope_b"]
    made = str(tables.score_table(suites, old))
    read = Reader(made)
    assert read.rows[0] == [
        "Suite", "Score | 95 % interval", "n", "Blind", "Baseline", "Difference | 95 % interval", "Relative", "Unparsed", "Scorer",
    ]  # fmt: skip
    row = read.row("pope_a")
    assert row[:3] == ["pope_a | accuracy", ".80 ±.05 | .69 to .88", "70"]
    assert re.fullmatch(r"\.\d\d ±\.\d\d \| n \d+", row[3])  # not all questions could be asked blind
    # Newcombe's example: 56 of 70 against 48 of 80 is .200 with .0524 to .3339.
    assert row[4:7] == [".60 ±.05 | n 80†", "+.20 ±.07 | +.05 to +.33", "+33.3 %"]
    assert row[8] == "one_word/1"
    assert read.row("pope_b")[4:7] == ["–", "–", "–"]
    assert read.row("scenes")[4].endswith("†")
    assert "the baseline has another scorer" in made
    assert f"count as wrong: 3 of {suites['pope_a']['measures']['unparsed']['n']}." in made
    groups = [row[0] for row in read.rows if len(row) == 1]
    assert groups == ["General", "Hallucination"]
    both = [suites[name]["measures"]["accuracy"] for name in ("pope_a", "pope_b")]
    value = sum(m["value"] for m in both) / 2
    assert read.row("Mean of 2")[1].startswith(f"{numbers.plain(value)} ±")
    assert read.row("Mean of 2")[4:7] == ["–", "–", "–"]  # a mean over fewer suites would be another number


def test_all_measures_and_kinds_are_in_the_detail_tables(page: Page) -> None:
    entry = page.scores["suites"]["scenes"]
    read = Reader(str(tables.detail_tables("scenes", entry)))
    kinds = {row[0]: row for row in read.rows}
    assert set(entry["by_kind"]) | set(entry["measures"]) < set(kinds)
    assert kinds["colour"][1:4] == [
        numbers.with_error(entry["by_kind"]["colour"]["accuracy"]),
        numbers.interval_text(entry["by_kind"]["colour"]["accuracy"]),
        str(entry["by_kind"]["colour"]["accuracy"]["n"]),
    ]


def test_plots_have_a_row_a_kind_with_interval_blind_mark_and_chance(page: Page, tmp_path: Path) -> None:
    scores = json.loads(json.dumps(page.scores))
    entry = scores["suites"]["scenes"]
    entry["measures"]["chance"] = Measure(0.25, 10).as_dict()
    made = Page({})
    made.scores = {**scores, "suites": {"scenes": entry}}
    text = made.write(tmp_path / "r.html")
    plot = text.split('id="plots"')[1].split("</section>")[0]
    assert plot.count('class="dot"') == 1 + len(entry["by_kind"])
    assert plot.count('class="interval"') == 1 + len(entry["by_kind"])
    assert plot.count('class="blind"') == 1
    assert '<line x1="25.00%" x2="25.00%" y1="1" y2="19" class="chance">' in plot
    low, high = numbers.interval(entry["measures"]["accuracy"]) or (0, 0)
    assert f'<line x1="{100 * low:.2f}%" x2="{100 * high:.2f}%"' in plot


@pytest.mark.parametrize(
    ("measure", "text", "interval"),
    [
        (share([True] * 5 + [False] * 5), ".50 ±.16", ".24 to .76"),
        (share([True] * 7), "1.00 ±.00", ".65 to 1.00"),  # Wilson's has a width even here
        (Measure(0.6345, 40_000, 0.0024), ".634 ±.002", ".630 to .639"),
        (mean([-1.5, -2.5, -2.0], "nats"), "−2.00 ±.29 nats", "−2.57 to −1.43"),
        (Measure(12, 200, None, "count"), "12", "–"),
        (Measure(0.5, 10, 0.2), ".50 ±.20", ".11 to .89"),  # no share of independent questions
        (Measure(0.97, 10, 0.1), ".97 ±.10", ".77 to 1.00"),
        (Measure(-0.001, 10, 0.1, "difference"), ".00 ±.10", "−.20 to .20"),
        (Measure(None, 0), "–", "–"),
    ],
)
def test_numbers_are_written_as_papers_write_them(measure: Measure, text: str, interval: str) -> None:
    assert (numbers.with_error(measure.as_dict()), numbers.interval_text(measure.as_dict())) == (
        text,
        interval,
    )


def test_nothing_relative_is_said_of_a_baseline_of_nothing() -> None:
    zero, some = share([False] * 4).as_dict(), share([True] * 4).as_dict()
    assert numbers.relative(some, zero) == "–"
    assert numbers.relative(zero, some) == "−100.0 %"
    assert numbers.difference(some, mean([1.0, 2.0], "nats").as_dict()) is None


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.booleans()), max_size=60),
    st.integers(0, 70),
)
def test_the_wall_takes_from_all_kinds_and_verdicts_in_turn(
    drawn: list[tuple[str, str, bool]], most: int
) -> None:
    records = [
        {"suite": suite, "kind": kind, "id": str(at), "right": right, "parsed": "p"}
        for at, (suite, kind, right) in enumerate(drawn)
    ]
    chosen = wall.chosen(records, most)
    assert len(chosen) == min(most, len(records)) == len({r["id"] for r in chosen})
    assert wall.chosen(records[::-1], most) == chosen
    there, taken = (Counter((r["suite"], r["kind"], r["right"]) for r in rows) for rows in (records, chosen))
    short = [taken[stratum] for stratum in there if taken[stratum] < there[stratum]]
    assert all(taken[stratum] <= min(short) + 1 for stratum in there if short)


def test_an_answer_is_right_wrong_unparsed_or_not_judged() -> None:
    marks = [(True, "a"), (False, "a"), (False, None), (None, None)]
    assert [wall.verdict({"right": r, "parsed": p}) for r, p in marks] == [
        "right",
        "wrong",
        "unparsed",
        "open",
    ]
    with pytest.raises(UserError, match="prediction s, 7 is not marked; score it first"):
        wall.verdict({"suite": "s", "id": "7", "output": "yes"})


def test_nothing_in_the_data_leaves_its_script() -> None:
    value = {"a": "</script><!--<script>", "b": [float("nan"), 1.5, "\ud800 \u2028"], "c": None}
    block = str(markup.data_block("report", value))
    assert block.count("<") == 2
    assert json.loads(block.split(">", 1)[1].rsplit("<", 1)[0]) == {
        **value,
        "b": [None, 1.5, "\ud800 \u2028"],
    }


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ({}, {}, "report: scores: no scores of opsin eval"),
        ({"suites": {}}, {"baseline": {"suites": 3}}, "report: baseline: no scores of opsin eval"),
        ({"suites": {}}, {"wall": -1}, "report: a wall of -1 pictures; use 0 or more"),
    ],
)
def test_what_is_no_report_is_said(
    scores: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = Page({})
    made.scores = scores
    with pytest.raises(UserError, match=message):
        made.write(tmp_path / "r.html", **options)
    assert not list(tmp_path.iterdir())
