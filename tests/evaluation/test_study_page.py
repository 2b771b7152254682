"""The page of a study: what stands on it, and that a real browser shows it without network, on a phone and a desktop."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from opsin.evaluation.study import write_study_report
from opsin.evaluation.study.analyse import analyse
from opsin.evaluation.study.words import difference, level, probability

from report_pages import Reader
from studies import StudyMaker, cell, default_study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
HOSTILE = "<script>alert(1)</script><img src=x onerror=\"document.title='owned'\">"
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the default study is shaped, of three seeds; its question is one that must never run."""
    folder = tmp_path_factory.mktemp("study")
    made = default_study(
        folder, seeds=(17, 18, 19), suites={"minimal_pairs": 300, "conflict": 20, "captions": 12, "text": 10}
    )
    made.study["question"] = HOSTILE
    made.write()
    write_study_report(folder, wall=20)
    return folder


@pytest.fixture(scope="module")
def text(study: Path) -> str:
    return (study / "report.html").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_the_same_again(study: Path, text: str) -> None:
    Reader(text)
    before = (study / "ablation.json").read_bytes()
    write_study_report(study, wall=20)
    assert (study / "report.html").read_text(encoding="utf-8") == text
    assert (study / "ablation.json").read_bytes() == before
    assert "<script>alert" not in text and not re.search(r"https?://", text)


def test_numbers_on_the_page_are_those_of_the_analysis(study: Path, text: str) -> None:
    found, page = analyse(study), Reader(text)
    primary = found["endpoints"][found["primary"]]
    for name in ("l2t", "ross+l2t", "vift"):
        row = primary["cells"][name]
        cells = (
            page.row(name + (" | against" if name == "vift" else ""))
            if name == "vift"
            else next(r for r in page.rows if r[0] == name)
        )
        assert level(row["level"], "share") in cells[1]
        assert difference(row["difference"], "share") in cells[1]
    runs = next(r for r in page.rows if r[0].startswith("l2t | l2t"))
    assert runs[2:] == [f"{v:.3f}".lstrip("0") for v in primary["cells"]["l2t"]["level"]["by_seed"]]
    assert "failed" in next(r for r in page.rows if r[0] == "blind-trained | no method")[3]
    effects = {tuple(e["factors"]): e["effect"] for e in primary["effects"]}
    assert difference(effects["ross", "l2t"], "share") in page.row("ross × l2t")[1]
    assert "blind-trained, seed 18: failed: loss is not a number at step 211" in text


def test_every_run_is_linked_and_every_link_leads_somewhere(study: Path, text: str) -> None:
    links = set(re.findall(r'href="([^"]+)"', text)) - {"data:,"}
    runs = {link.rstrip("/") for link in links if link.startswith("cells/")}
    done = {p.parent.relative_to(study).as_posix() for p in study.glob("cells/*/scores.json")}
    from urllib.parse import unquote

    assert {unquote(run) for run in runs} == done
    ids = set(re.findall(r'id="([^"]+)"', text))
    assert {link[1:] for link in links if link.startswith("#")} <= ids


def test_a_study_of_two_cells_and_nothing_else_has_a_page(tmp_path: Path) -> None:
    """One seed, no pictures, no factorial, no secondary endpoint, none fixed as the primary one."""
    made = StudyMaker(
        tmp_path,
        [cell("baseline", (), "baseline"), cell("l2t", ["l2t"], skill=2.0)],
        {"minimal_pairs": 60},
        seeds=(17,),
    )
    made.study["primary"] = None
    made.write()
    for file in tmp_path.glob("cells/*/*"):
        if file.name not in ("predictions.jsonl", "scores.json"):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    page = write_study_report(tmp_path).read_text(encoding="utf-8")
    Reader(page)
    assert "No primary endpoint was fixed before the runs" in page
    assert "1 seed: interval over pictures only" in page and "No picture: the study kept none" in page
    assert "Learning curves" not in page and "Together" not in page


def test_suites_at_the_ceiling_are_grey_and_judge_nothing(tmp_path: Path) -> None:
    cells = [cell("baseline", (), "baseline"), cell("l2t", ["l2t"], skill=-3.0)]
    StudyMaker(
        tmp_path, cells, {"minimal_pairs": 60, "conflict": 10}, base=0.9999, primary=("conflict", "accuracy")
    )
    page = write_study_report(tmp_path, wall=0).read_text(encoding="utf-8")
    row = next(r for r in Reader(page).rows if r[0] == "l2t")
    assert "not judged" in row[1] and "(" in row[1]  # the difference is shown, with its interval
    assert "at ceiling" in page and page.count("number grey") >= 4
    assert "Where cells disagree" not in page


def test_no_difference_is_printed_without_its_interval() -> None:
    bare = {"value": 0.2, "low": None, "high": None, "standard_error": None, "spread": None}
    assert difference(bare, "share") == difference(None, "share") == "–"
    told = {**bare, "low": 0.004, "high": 0.396, "standard_error": 0.1}
    assert difference(told, "share") == "+.200 (+.004 to +.396)"  # an end that is not 0 never reads 0
    assert level({**told, "spread": 0.05}, "nats") == ".200 ±.050 nats"
    assert (probability(0.0004), probability(0.0312)) == ("< .001", ".031")


needs_browser = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, study: Path) -> Any:
    resize(browser, "desktop")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get((study / "report.html").as_uri())
    return browser


def resize(browser: Any, size: str) -> None:
    width, height = SIZES[size]
    shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)


@needs_browser
@pytest.mark.parametrize("size", SIZES)
def test_nothing_sticks_out_of_the_screen(page: Any, size: str) -> None:
    resize(page, size)
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    root = page.execute_script("const r = document.documentElement; return [r.scrollWidth, r.clientWidth]")
    assert root[0] == root[1]
    assert page.execute_script("return innerWidth") == SIZES[size][0]
    out = page.execute_script(
        "return [...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.scroll > *, svg'))"
        ".filter(e => { const r = e.getBoundingClientRect(); return r.width && (r.left < -1 || r.right > innerWidth + 1) })"
        ".map(e => e.outerHTML.slice(0, 200))"
    )
    assert out == []
    words = page.execute_script(  # of a drawing, within it
        "return [...document.querySelectorAll('svg.lines text')].filter(t => { const r = t.getBoundingClientRect(),"
        " s = t.closest('svg').getBoundingClientRect(); return r.left < s.left - 2 || r.right > s.right + 2 }).map(t => t.textContent)"
    )
    assert words == []


@needs_browser
def test_it_asks_for_nothing_and_complains_of_nothing(page: Any) -> None:
    assert page.title == "made up"
    sent = [
        log["message"]
        for log in page.get_log("performance")
        if '"Network.requestWillBeSent"' in log["message"]
    ]
    assert all('"url":"file:' in one or '"url":"data:' in one for one in sent)
    assert page.get_log("browser") == []


@needs_browser
def test_it_reads_without_eyes_and_without_a_mouse(page: Any) -> None:
    page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    for control in page.find_elements(
        By.CSS_SELECTOR, "input, select, button, nav, [role=region], summary, svg[role=img]"
    ):
        assert control.accessible_name or control.text, control.get_attribute("outerHTML")[:200]
    assert page.execute_script(
        "return [...document.querySelectorAll('table')].every(t => t.caption.textContent)"
    )
    assert not page.find_elements(
        By.CSS_SELECTOR,
        "th:not([scope]), img:not([alt]), svg:not([role=img]):not([aria-hidden]):not(svg svg)",
    )
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    levels = page.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1 == levels.count(1) and all(
        later - earlier <= 1 for earlier, later in pairwise(levels)
    )
    region = page.find_element(By.CSS_SELECTOR, "#table .scroll")
    region.send_keys(Keys.ARROW_RIGHT)
    page.execute_async_script("setTimeout(arguments[0], 400)")
    assert page.execute_script("return arguments[0].scrollLeft", region) > 0
    verdicts = {
        (e.text[0], e.text[1:].strip()) for e in page.find_elements(By.CSS_SELECTOR, "#table .verdict")
    }
    assert {("▲", "helps"), ("○", "no evidence"), ("–", "not judged")} <= verdicts


@needs_browser
def test_the_wall_shows_its_pictures_and_filters(page: Any) -> None:
    cards = page.find_elements(By.CSS_SELECTOR, "#cards > li")
    assert 0 < len(cards) <= 20
    sources = page.execute_script(
        "return [...document.images].map(i => [i.src.slice(0, 11), i.complete && i.naturalWidth > 0])"
    )
    assert sources and all(loaded and source == "data:image/" for source, loaded in sources)
    facts = page.execute_script("return JSON.parse(document.getElementById('report').textContent).cards")
    page.find_element(By.CSS_SELECTOR, "input[name=verdict][value=right]").click()
    shown = [card.is_displayed() for card in cards]
    assert shown == [fact[2] == "right" for fact in facts] and any(shown)
