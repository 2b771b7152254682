"""``report.html`` opened in a real headless Chromium: filters, search, narrow screens, dark mode, and no way out or in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from opsin.evaluation.records import Item

from report_pages import Page, in_turn, scene_items

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs Chromium and its driver: apt-get install chromium chromium-driver",
)

HOSTILE = "<script>alert(1)</script><img src=x onerror=\"document.title='owned'\">'\"</article>&amp;"
SIZES = {"phone": (360, 740), "desktop": (1280, 900)}
OPEN = "for (const details of document.querySelectorAll('details')) details.open = true"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three suites, one of which is called, and asks and answers, what must never run."""
    hostile = Item(HOSTILE, f"<image>\n{HOSTILE}", scene_items("uniform", 1)[0].pictures, HOSTILE, HOSTILE)
    plain = Item("plain", "Is 2 more than 1?", (), "yes", "arithmetic")
    made = Page(
        {
            "scenes": ("general", scene_items("uniform", 12), in_turn),
            "pope": ("hallucination", scene_items("exists_popular", 6), lambda at, item: "yes"),
            HOSTILE: ("reasoning", [hostile, plain], lambda at, item: HOSTILE),
        }
    )
    made.scores["model"] = HOSTILE
    measure = made.scores["suites"]["pope"]["measures"]["accuracy"]
    numbers = {HOSTILE: measure, "by_layer": {HOSTILE: [measure] * 3}, "note": HOSTILE}
    path = tmp_path_factory.mktemp("report") / "report.html"
    made.write(path, title=HOSTILE, wall=60, baseline=made.scores, analyses=[(HOSTILE, numbers, None)])
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One headless Chromium with a profile of its own; its logs tell what pages asked for and complained of."""
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


def resize(browser: Any, size: str) -> None:
    width, height = SIZES[size]
    shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    """The page, freshly opened on a desktop in light mode."""
    resize(browser, "desktop")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(report.as_uri())
    return browser


def facts(page: Any) -> list[list[str]]:
    """(suite, kind, verdict) of each card, as the page carries them."""
    return page.execute_script("return JSON.parse(document.getElementById('report').textContent).cards")


def visible(page: Any) -> list[int]:
    """Numbers of the cards that are seen."""
    return page.execute_script(
        "return [...document.querySelectorAll('#cards > li')].flatMap((c, i) => c.getClientRects().length ? [i] : [])"
    )


def choose(page: Any, verdict: str) -> None:
    page.find_element(By.CSS_SELECTOR, f"input[name=verdict][value='{verdict}']").click()


def pick(page: Any, name: str, value: str) -> None:
    """Choose an option by its place: selectors cannot name every value."""
    select = Select(page.find_element(By.ID, name))
    select.select_by_index([option.get_attribute("value") for option in select.options].index(value))


def told(page: Any) -> str:
    return page.find_element(By.ID, "count").text


def test_verdicts_suites_and_kinds_filter_the_cards(page: Any) -> None:
    cards = facts(page)
    assert len(cards) == 60
    assert visible(page) == list(range(60))
    assert told(page) == "60 of 60 shown"
    for verdict in ("right", "wrong", "unparsed"):
        choose(page, verdict)
        fitting = [at for at, card in enumerate(cards) if card[2] == verdict]
        assert fitting
        assert visible(page) == fitting
        assert told(page) == f"{len(fitting)} of 60 shown"
    pick(page, "suite", "scenes")
    kinds = Select(page.find_element(By.ID, "kind"))
    assert {o.get_attribute("value") for o in kinds.options} == {
        "",
        *(c[1] for c in cards if c[0] == "scenes"),
    }
    pick(page, "kind", "colour")
    choose(page, "wrong")
    fitting = [at for at, card in enumerate(cards) if card == ["scenes", "colour", "wrong"]]
    assert fitting
    assert visible(page) == fitting
    right = page.find_element(By.CSS_SELECTOR, "label:has(input[value=right]) small").text
    assert int(right) == cards.count(["scenes", "colour", "right"])  # of what the other filters leave
    pick(page, "suite", "pope")  # which has no such kind: that filter goes
    assert kinds.first_selected_option.get_attribute("value") == ""
    page.find_element(By.CSS_SELECTOR, "button[type=reset]").click()
    page.execute_async_script("setTimeout(arguments[0], 0)")
    assert visible(page) == list(range(60))
    assert len(kinds.options) == 1 + len({card[1] for card in cards})


def test_a_search_finds_words_of_questions_answers_and_ids(page: Any) -> None:
    cards = page.execute_script(
        "return [...document.querySelectorAll('#cards > li')].map(c => [...c.querySelectorAll('.question, dd, .where, .id')]"
        ".map(e => e.textContent).join(' ').toLowerCase())"
    )
    box = page.find_element(By.ID, "search")
    box.send_keys("CUBE  red")
    fitting = [at for at, words in enumerate(cards) if "cube" in words and "red" in words]
    assert 0 < len(fitting) < 60
    assert visible(page) == fitting
    box.clear()
    box.send_keys("right")  # the verdict is no word of the question
    assert visible(page) == [at for at, words in enumerate(cards) if "right" in words]
    box.send_keys(" nowhere to be found")
    assert visible(page) == []
    assert told(page) == "0 of 60 shown"
    assert page.find_element(By.ID, "none").is_displayed()


def test_the_filters_need_no_mouse(page: Any) -> None:
    page.find_element(By.ID, "search").send_keys(Keys.TAB)
    first = page.switch_to.active_element
    assert (first.get_attribute("name"), first.get_attribute("value")) == ("verdict", "")
    first.send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("value") == "right"
    assert visible(page) == [at for at, card in enumerate(facts(page)) if card[2] == "right"]
    focused = page.switch_to.active_element.find_element(By.XPATH, "following-sibling::span")
    assert focused.value_of_css_property("outline-style") == "solid"


def test_controls_tables_and_pictures_have_names(page: Any) -> None:
    page.execute_script(OPEN)
    for control in page.find_elements(By.CSS_SELECTOR, "input, select, button, nav, [role=region], summary"):
        assert control.accessible_name or control.text, control.get_attribute("outerHTML")[:200]
    assert page.execute_script(
        "return [...document.querySelectorAll('table')].every(t => t.caption.textContent)"
    )
    assert not page.find_elements(By.CSS_SELECTOR, "th:not([scope]), img:not([alt])")
    ids = page.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    levels = page.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1 == levels.count(1)
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    signs = {(e.text[0], e.text[1:].strip()) for e in page.find_elements(By.CSS_SELECTOR, ".card .verdict")}
    assert signs == {("✓", "Right"), ("✗", "Wrong"), ("?", "Unparsed")}


@pytest.mark.parametrize("size", SIZES)
def test_nothing_sticks_out_of_the_screen(page: Any, size: str) -> None:
    resize(page, size)
    page.execute_script(OPEN)
    assert page.execute_script("return innerWidth") == SIZES[size][0]
    root = page.execute_script("const r = document.documentElement; return [r.scrollWidth, r.clientWidth]")
    assert root[0] == root[1]
    out = page.execute_script(
        "return [...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.scroll > *, svg'))"
        ".filter(e => { const r = e.getBoundingClientRect(); return r.width && (r.left < -1 || r.right > innerWidth + 1) })"
        ".map(e => e.outerHTML.slice(0, 200))"
    )
    assert out == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_readable_in_light_and_in_dark(page: Any, scheme: str) -> None:
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    colours = page.execute_script(
        """
        const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
        const behind = (e) => { for (; e; e = e.parentElement) {
          const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } };
        const names = ["h1", "td", "th small", ".about", "a", ".where", ".id", ".question", "dd", "legend", ".plot small",
          ".right .verdict", ".wrong .verdict", ".unparsed .verdict", "fieldset input:checked + span", "output", "footer"];
        return names.map((n) => { const e = document.querySelector(n);
          return [n, rgb(getComputedStyle(e).color).slice(0, 3), behind(e)]; });
        """
    )

    def light(colour: list[float]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, ink, paper in colours:
        low, high = sorted((light(ink), light(paper)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name
    assert (light(colours[0][2]) < 0.1) == (scheme == "dark")


def test_all_pictures_are_there_each_carried_once(page: Any) -> None:
    sources = page.execute_script(
        "return [...document.images].map(i => [i.src, i.complete && i.naturalWidth > 0])"
    )
    assert sources
    assert all(loaded and source.startswith("data:image/") for source, loaded in sources)
    distinct = {source for source, _ in sources}
    assert len(distinct) < len(sources)  # several questions about a picture
    text = Path(page.current_url.removeprefix("file://")).read_text(encoding="utf-8")
    assert all(text.count(source) == 1 for source in distinct)


def test_the_page_asks_for_nothing_and_complains_of_nothing(page: Any) -> None:
    page.find_element(By.ID, "search").send_keys("cube")
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked_for = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked_for if not url.startswith("data:")} == {page.current_url}
    assert (
        page.execute_script(
            "return performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:'))"
        )
        == []
    )


def test_what_users_wrote_is_shown_and_never_runs(page: Any) -> None:
    assert page.title == HOSTILE  # as text
    assert page.find_element(By.TAG_NAME, "h1").text == HOSTILE
    assert len(page.find_elements(By.CSS_SELECTOR, "script")) == 2  # the data and ours
    assert not page.find_elements(By.CSS_SELECTOR, "[onerror], img[src=x]")
    pick(page, "suite", HOSTILE)
    pick(page, "kind", HOSTILE)
    (at,) = visible(page)
    card = page.find_elements(By.CSS_SELECTOR, "#cards > li")[at]
    assert card.find_element(By.CSS_SELECTOR, ".question").text == HOSTILE
    assert {dd.text for dd in card.find_elements(By.TAG_NAME, "dd")} == {HOSTILE}
    assert card.find_element(By.CSS_SELECTOR, ".id").text == HOSTILE
    assert page.get_log("browser") == []  # no policy had to step in either


def test_the_policy_holds_where_escaping_would_fail(page: Any) -> None:
    """As if markup had got in: neither scripts, handlers and styles run, nor is anything fetched."""
    broken = page.execute_async_script(
        """
        const done = arguments[0], broken = [];
        addEventListener("securitypolicyviolation", (e) => broken.push(e.effectiveDirective));
        const script = document.createElement("script"); script.textContent = "document.title = 'owned'";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", `<img src="data:," onerror="document.title = 'owned'"
          ><img src="http://127.0.0.1:9/x.png"><link rel="stylesheet" href="http://127.0.0.1:9/x.css"
          ><iframe src="http://127.0.0.1:9/"></iframe><style>h1 { display: none }</style>`);
        fetch("http://127.0.0.1:9/").catch(() => setTimeout(() => done(broken), 100));
        """
    )
    assert set(broken) >= {
        "script-src-elem",
        "script-src-attr",
        "img-src",
        "style-src-elem",
        "frame-src",
        "connect-src",
    }
    assert page.title == HOSTILE
    assert page.find_element(By.TAG_NAME, "h1").is_displayed()


def test_a_page_without_a_wall_complains_of_nothing(browser: Any, tmp_path: Path) -> None:
    Page({"scenes": ("general", scene_items("uniform", 2), in_turn)}).write(tmp_path / "r.html", wall=0)
    browser.get_log("browser")
    browser.get((tmp_path / "r.html").as_uri())
    assert browser.get_log("browser") == []
    assert not browser.find_elements(By.ID, "wall")
    assert browser.find_element(By.CSS_SELECTOR, "#scores th[scope=row]").text.split("\n") == [
        "scenes",
        "accuracy",
    ]
