"""The explorer in Chromium: every page of four kinds of data, keys, hostile texts, no script, no request elsewhere."""

from __future__ import annotations

import csv
import importlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from PIL import Image

import browser
from explorer import build_place, collate, listen, make_row, make_task
from paths import ROOT
from tasks.toy import CONFIG
from tracin_ann import BuildConfig, Description, build
from tracin_ann.serve import IndexLocation, Settings, create_app
from tracin_ann.serve.pages import context as context_of_pages
from tracin_ann.serve.work import ComputeExactAnswers

pytestmark = [
    pytest.mark.skipif(bool(browser.find_missing()), reason=browser.find_missing() or "-"),
    pytest.mark.slow,
]
PAGES = {
    "overview": "/",
    "queries": "/query",
    "answers": "/query?rows=0-1&k=6",
    "exact answers": "/query?rows=2&k=4&rerank=exact&candidates=20",
    "row": "/rows/7?queries=yes",
    "pair": "/pair?row=7&query=0",
    "suspects": "/suspects",
    "comparison": "/compare?rows=0&k=6&other=cosine",
    "hubs": "/hubs",
    "duplicates": "/duplicates?threshold=0.9",
}
DATA = ("digits", "mnist", "sst2", "tabular")
N_ROWS = 1200
PAYLOAD = "window.hacked=(window.hacked||0)+1"
HOSTILE = [
    f"<script>{PAYLOAD}</script>",
    f"</script><script>{PAYLOAD}</script>",
    f"<img src=x onerror={PAYLOAD}>",
    f'"><svg onload={PAYLOAD}>',
    f"'><body onload={PAYLOAD}>",
    f"javascript:{PAYLOAD}",
    f'" onmouseover="{PAYLOAD}" autofocus onfocus="{PAYLOAD}" x="',
    f"' onclick='{PAYLOAD}' x='",
    f"</textarea><script>{PAYLOAD}</script>",
    f"</title><script>{PAYLOAD}</script>",
    f"</style><script>{PAYLOAD}</script>",
    f"<iframe srcdoc='<script>parent.{PAYLOAD}</script>'>",
    f"<a href=javascript:{PAYLOAD}>x</a>",
    f"<form action=javascript:{PAYLOAD}><button>x</button></form>",
    f"<math><mi xlink:href=javascript:{PAYLOAD}>x</mi></math>",
    f"<details open ontoggle={PAYLOAD}>x</details>",
    f"<object data=javascript:{PAYLOAD}></object>",
    f"<div hx-on:load='{PAYLOAD}' hx-trigger='load' hx-get='/'>x</div>",
    f"<div hx-vals='js:{{x: {PAYLOAD}}}' hx-get='/' hx-trigger='load'>x</div>",
    f"{{{{ {PAYLOAD} }}}}{{% raw %}}",
    f"&lt;script&gt;{PAYLOAD}&lt;/script&gt;",
    f"<!--><script>{PAYLOAD}</script>-->",
    f"<meta http-equiv=refresh content='0;url=javascript:{PAYLOAD}'>",
    f"../../<base href=//evil.example><script src=//evil.example/x.js>{PAYLOAD}",
    f"\u202e<script\u0000>{PAYLOAD}</script>\u2028\ud800`${{{PAYLOAD}}}`",
]


@dataclass(frozen=True)
class Example:
    """A built index of an example, and how it is opened."""

    location: IndexLocation
    has_pictures: bool


def build_example(name: str, folder: Path, data: str) -> Example:
    """Train the model of an example and build its index."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        example = importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "examples"))
    if name == "digits":
        example.train(folder, 0)
        arguments = {"runs": str(folder)}
    elif name == "tabular":
        example.train(str(folder))
        arguments = {"out": str(folder)}
    elif name == "mnist":
        example.train(data, str(folder), N_ROWS, 0)
        arguments = {"data_path": data, "runs": str(folder), "rows": str(N_ROWS)}
    else:
        example.train(data, str(folder), N_ROWS)
        arguments = {"data": data, "out": str(folder), "rows": str(N_ROWS)}
    task = example.task(**arguments)
    build(task, folder / "index", BuildConfig(device="cpu", yardstick=False))
    return Example(IndexLocation(folder / "index", task, device="cpu"), name in ("digits", "mnist"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def started(saved: Path) -> Iterator[Any]:
    with browser.open_browser(saved) as driver:
        yield driver


@pytest.fixture
def chromium(started: Any) -> Iterator[Any]:
    """Yield the browser; after the test, its console is empty and it has requested pages of this machine only."""
    started.get("about:blank")
    started.get_log("browser")
    browser.take_requests(started)
    browser.set_window(started, 1200, 900)
    yield started
    assert started.get_log("browser") == []
    allowed = ("http://127.0.0.1:", "about:", "data:")
    assert [url for url in browser.take_requests(started) if not url.startswith(allowed)] == []


@contextmanager
def show(driver: Any, app: FastAPI) -> Iterator[str]:
    """Yield the address of an application, and leave its last page before it stops."""
    with listen(app) as address:
        yield address
        driver.get("about:blank")


def visit(driver: Any, address: str) -> None:
    """Open a page and wait until its jobs have ended and its images are loaded."""
    driver.get(address)
    wait_for(driver, "return !document.getElementById('progress')")
    driver.execute_script("for (const image of document.images) image.loading = 'eager'")
    wait_for(driver, "return Array.from(document.images).every((image) => image.complete)")


def wait_for(driver: Any, script: str) -> None:
    until = time.monotonic() + 60
    while not driver.execute_script(script):
        assert time.monotonic() < until, script
        time.sleep(0.05)


def find_soon(driver: Any, selector: str) -> list[Any]:
    """Return the elements of a page as soon as there are any; it needs no script."""
    until = time.monotonic() + 60
    while not (found := driver.find_elements("css selector", selector)) and time.monotonic() < until:
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module", params=DATA)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Example]]:
    name, data = request.param, ""
    if name in ("digits", "tabular"):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    else:
        data = str(request.getfixturevalue("data_dir"))
    example = build_example(name, tmp_path_factory.mktemp(name), data)
    with listen(create_app(example.location)) as address:
        yield address, example


@pytest.mark.parametrize("page", PAGES)
def test_every_page_works_in_light_and_dark(chromium: Any, served: tuple[str, Example], page: str) -> None:
    address, example = served
    browser.set_window(chromium, 1200, 900)
    visit(chromium, address + PAGES[page])
    assert chromium.execute_script("return Array.from(document.images).filter((i) => !i.naturalWidth).length") == 0
    shown = chromium.execute_script("return document.querySelectorAll('.pic').length")
    assert page == "overview" or (shown > 0) is example.has_pictures
    assert chromium.execute_script(browser.CONTRASTS) == []
    browser.set_window(chromium, 1200, 900, dark=True)
    assert chromium.execute_script(browser.CONTRASTS) == []
    browser.set_window(chromium, 390, 800)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= 390


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build_place(tmp_path_factory.mktemp("toy"))


def test_twenty_suspects_are_decided_by_keys_and_exported(chromium: Any, toy: Any, saved: Path, tmp_path: Path) -> None:
    app = create_app(toy.location, Settings(decisions=tmp_path / "decisions.sqlite"))
    with show(chromium, app) as address:
        visit(chromium, f"{address}/suspects")
        names = [item.get_attribute("aria-label") for item in chromium.find_elements("class name", "sus")]
        assert len(names) == 20
        expected = []
        browser.press(chromium, "j")
        for place, name in enumerate(names):
            key = str(place % 3 + 1)
            assert chromium.switch_to.active_element.get_attribute("aria-label") == name
            browser.press(chromium, key)
            verdict = ("keep", "relabel", "drop")[place % 3]
            expected.append((name.removeprefix("row "), verdict))
            decided = f"return document.querySelectorAll('[aria-pressed=true]').length === {place + 1}"
            wait_for(chromium, decided)
            next_name = names[min(place + 1, len(names) - 1)]
            wait_for(chromium, f"return document.activeElement.getAttribute('aria-label') === {json.dumps(next_name)}")
        assert chromium.find_element("id", "count").text == "20 of 20 on this page decided"
        # The last one is undone and decided again; k goes back.
        browser.press(chromium, "0")
        wait_for(chromium, "return document.querySelectorAll('[aria-pressed=true]').length === 19")
        browser.press(chromium, "3")
        wait_for(chromium, "return document.querySelectorAll('[aria-pressed=true]').length === 20")
        expected[-1] = expected[-1][0], "drop"
        browser.press(chromium, "k")
        assert chromium.switch_to.active_element.get_attribute("aria-label") == names[-2]
        for form in ("csv", "json"):
            chromium.execute_script(f"document.getElementById('save-{form}').focus()")
            browser.press(chromium, "\ue007")  # enter
        table = browser.wait_for_file(saved / "decisions.csv")
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {(row["id"], row["verdict"]) for row in rows} == set(expected)
        assert all((row["new_label"] != "") is (row["verdict"] == "relabel") for row in rows)
        records = json.loads(browser.wait_for_file(saved / "decisions.json").read_text())
        assert [str(record["id"]) for record in records] == [row["id"] for row in rows]
        # They are there when the page is opened again.
        visit(chromium, f"{address}/suspects")
        assert len(chromium.find_elements("css selector", "[aria-pressed=true]")) == 20


def test_exact_answers_follow_the_stored_ones(chromium: Any, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, go = ComputeExactAnswers.run, []

    def run_slowly(self: Any, index: Any, steps: Any) -> Any:
        while not go:
            steps.progress("queries", 1, 4)
            time.sleep(0.02)
        return run(self, index, steps)

    monkeypatch.setattr(ComputeExactAnswers, "run", run_slowly)
    monkeypatch.setattr(context_of_pages, "_FIRST_WAIT", 0.1)
    with show(chromium, create_app(toy.location)) as address:
        chromium.get(f"{address}/query?rows=0&k=4&rerank=exact")
        wait_for(chromium, "return document.querySelector('#progress progress')?.value === 1")
        # Hits with exact scores also show their stored scores.
        assert chromium.find_elements("class name", "score") and not chromium.find_elements("class name", "det")
        chromium.execute_script("window.unchanged = true; window.first = document.getElementById('progress')")
        status = "return document.getElementById('status').textContent"
        assert "exact scores" in chromium.execute_script(status)
        # The focus stays on the button while the progress is replaced, and goes to the result.
        chromium.execute_script("document.getElementById('cancel').focus()")
        wait_for(chromium, "return !window.first.isConnected")
        assert chromium.execute_script("return document.activeElement.id") == "cancel"
        go.append(True)
        wait_for(chromium, "return !document.getElementById('progress')")
        assert chromium.execute_script(status) == "The result is complete."
        assert chromium.execute_script("return document.activeElement.id") == "result"
        assert chromium.execute_script("return window.unchanged") is True
        assert len(chromium.find_elements("class name", "det")) == len(chromium.find_elements("class name", "score"))
        go.clear()
        chromium.get(f"{address}/query?rows=1&k=4&rerank=exact")
        wait_for(chromium, "return document.getElementById('progress') !== null")
        browser.click(chromium, chromium.find_element("css selector", "#progress button"))
        wait_for(chromium, "return !location.search.includes('exact')")
        assert chromium.find_elements("class name", "score")
        go.append(True)


@pytest.mark.parametrize("has_scripts", [True, False])
def test_ticked_rows_are_kept_on_other_pages_of_the_list(chromium: Any, toy: Any, has_scripts: bool) -> None:
    def tick(place: int) -> None:
        browser.click(chromium, chromium.find_elements("css selector", ".pick input")[place])

    def turn(page: int) -> None:
        browser.click(chromium, chromium.find_element("css selector", f"button[name=page][value='{page}']"))

    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not has_scripts})
    try:
        with show(chromium, create_app(toy.location)) as address:
            chromium.get(f"{address}/query?side=train")
            tick(2)
            turn(24)
            find_soon(chromium, "button[value='0']")
            tick(1)
            turn(0)
            find_soon(chromium, "button[value='24']")
            ticked = chromium.find_elements("css selector", ".pick input:checked")
            assert [box.get_attribute("value") for box in ticked] == ["2"]
            browser.click(chromium, chromium.find_element("css selector", ".send button"))
            assert find_soon(chromium, ".score")
            assert "rows=2&rows=25" in chromium.current_url
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_pages_work_without_scripts(chromium: Any, toy: Any, tmp_path: Path) -> None:
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        with show(chromium, create_app(toy.location, Settings(decisions=tmp_path / "decisions.sqlite"))) as address:
            chromium.get(f"{address}/query")
            chromium.find_elements("css selector", ".pick input")[2].click()
            chromium.find_element("css selector", "button.main").click()
            assert find_soon(chromium, ".score") and "rows=2" in chromium.current_url
            chromium.get(f"{address}/suspects")
            find_soon(chromium, ".decide")  # the page loads itself again
            chromium.find_elements("css selector", "button[value=drop]")[1].click()
            assert [button.text for button in find_soon(chromium, "[aria-pressed=true]")] == ["drop"]
            assert chromium.current_url.endswith("/suspects#s1")
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_screen_reader_finds_names(chromium: Any, toy: Any) -> None:
    named_roles = ("checkbox", "searchbox", "textbox", "combobox", "spinbutton", "button", "link", "image", "heading")
    with show(chromium, create_app(toy.location)) as address:
        chromium.execute_cdp_cmd("Accessibility.enable", {})
        for page in PAGES.values():
            visit(chromium, address + page)
            nodes = chromium.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
            roles = [(node.get("role", {}).get("value"), node.get("name", {}).get("value")) for node in nodes]
            assert [role for role, name in roles if role in named_roles and not name] == [], page
            assert {"main", "banner", "contentinfo", "navigation", "search", "heading"} <= {r for r, _ in roles}
        chromium.execute_cdp_cmd("Accessibility.disable", {})


def make_hostile_place(folder: Path) -> IndexLocation:
    """Build an index whose ids, labels, texts, columns and tokens attack the page."""
    sizes = [40]

    def text_of(row: Any) -> str:
        return HOSTILE[int(row["id"].partition("/")[2]) % len(HOSTILE)]

    task = replace(
        make_task(folder, sizes),
        describe=lambda row: Description(text=text_of(row), table={text_of(row): text_of(row)}),
        ids=lambda row: f"{row['id']} {text_of(row)}",
        columns=lambda row: {"label": text_of(row), "\"'&onload": row["y"]},
        query_data=lambda: [make_row(place, "query") for place in range(len(HOSTILE))],
        read_query=lambda record: {**make_row(3, "text"), "text": record["text"]},
        collate=collate,
    )
    build(task, folder / "index", CONFIG)
    return IndexLocation(folder / "index", task, device="cpu")


def test_no_hostile_text_runs_a_script(chromium: Any, tmp_path: Path) -> None:
    place = make_hostile_place(tmp_path)
    harmless = """return {hacked: window.hacked || 0,
      handlers: document.querySelectorAll('[onload],[onerror],[onclick],[onfocus],[onmouseover],[ontoggle]').length,
      foreign: Array.from(document.scripts).filter((s) => !s.src.startsWith(location.origin + '/static/')).length,
      elements: document.querySelectorAll('iframe, object, base, math, main script, body style').length,
      links: Array.from(document.links).filter((a) => a.origin !== location.origin).length}"""
    clean = {"hacked": 0, "handlers": 0, "foreign": 0, "elements": 0, "links": 0}
    with show(chromium, create_app(place, Settings(decisions=tmp_path / "decisions.sqlite"))) as address:
        pages = [
            *PAGES.values(),
            f"/query?rows=0-{len(HOSTILE) - 1}&k=3",
            "/query?side=train&start=0",
            "/query?start=20",
        ]
        for page in pages:
            visit(chromium, address + page)
            assert chromium.execute_script(harmless) == clean, page
        visit(chromium, f"{address}/suspects")
        browser.press(chromium, "j", "2")
        wait_for(chromium, "return document.querySelectorAll('[aria-pressed=true]').length === 1")
        assert chromium.execute_script(harmless) == clean
        assert chromium.get_log("browser") == []
        for text in HOSTILE:
            plain = quote(text.encode("utf-8", "replace"))
            for page in (f"/query?text={plain}&k=2", f"/query?find={plain}", f"/rows?row={plain}", f"/{plain}"):
                chromium.get(address + page)
                assert chromium.execute_script(harmless) == clean, page
            chromium.get_log("browser")  # pages of errors have the status of errors


def test_names_of_uploaded_files_run_no_script(chromium: Any, toy: Any, tmp_path: Path) -> None:
    with show(chromium, create_app(toy.location)) as address:
        for text in HOSTILE:
            name = text.replace("/", "_").replace("\0", "").encode("utf-8", "replace").decode()
            picture = tmp_path / f"{name}.png"
            Image.new("RGB", (6, 4)).save(picture)
            visit(chromium, f"{address}/query")
            chromium.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
            chromium.find_element("name", "picture").send_keys(str(picture))
            browser.click(chromium, chromium.find_element("css selector", "form[enctype] button"))
            wait_for(chromium, "return location.search.includes('upload=')")
            assert chromium.find_elements("class name", "score")
            assert "hacked" not in chromium.page_source
            assert chromium.execute_script("return window.hacked || 0") == 0
