"""Reports in Chromium: no network requests, filters, keys, saved choices, dark mode, print."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import browser
from images import draw_image
from tasks.toy import CONFIG, make_rows, make_toy_task
from tracin_ann import Description, InfluenceIndex, QueryOptions, build, write_report

pytestmark = [
    pytest.mark.skipif(bool(browser.find_missing()), reason=browser.find_missing() or "-"),
    pytest.mark.slow,
]

N, LISTED = 24, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with answers.html and suspects.html, and the suspects' records in suspects.json."""
    directory = tmp_path_factory.mktemp("browser")
    task = make_toy_task(
        directory,
        train_data=lambda: make_rows(N),
        columns=lambda row: {"label": int(row[1])},
        describe=lambda row: Description(
            text=f'row "{row[1]}", <b> {row[0][0]:.6f}',
            image=draw_image(row),
            tokens=[f"{row[0][0]:.6f}", "good"],
            token_scores=[-0.5, 1.0],
        ),
    )
    build(task, directory / "index", CONFIG)
    index = InfluenceIndex.open(directory / "index", task, device="cpu")
    ranked = index.self_influence(LISTED)
    write_report(index.query(range(4), options=QueryOptions(k=4)), directory / "answers.html", index)
    write_report(ranked, directory / "suspects.html", index)
    (directory / "suspects.json").write_text(json.dumps(ranked.records()))
    return directory


@pytest.fixture(scope="module")
def started(folder: Path) -> Iterator[Any]:
    with browser.open_browser(folder / "saved") as driver:
        yield driver


@pytest.fixture
def chromium(started: Any) -> Iterator[Any]:
    """Yield the browser; after the test, its log is empty and it has requested only the page."""
    browser.take_requests(started)
    browser.set_window(started, 1200, 900)
    yield started
    assert started.get_log("browser") == []
    assert [url for url in browser.take_requests(started) if not url.startswith(("file:", "data:", "blob:"))] == []


def list_visible(chromium: Any) -> list[int]:
    """Return the positions of the items that pass the filter."""
    script = "return Array.from(document.querySelectorAll('.item')).flatMap((x, i) => x.hidden ? [] : [i])"
    return list(chromium.execute_script(script))


def test_a_page_of_answers_opens_offline_and_filters(chromium: Any, folder: Path) -> None:
    from selenium.webdriver.support.ui import Select  # noqa: PLC0415

    page = (folder / "answers.html").as_uri()
    chromium.get(page)
    assert [url for url in browser.take_requests(chromium) if not url.startswith("data:")] == [page]
    assert list_visible(chromium) == [0, 1, 2, 3]
    css = "return getComputedStyle(document.querySelector('.pic')).backgroundImage"
    assert chromium.execute_script(css).startswith('url("data:image/png')
    browser.press(chromium, "j", "j")
    assert chromium.switch_to.active_element.get_attribute("id") == "q1"
    browser.press(chromium, "k", "/", f"good {make_rows(5, seed=2)[3][0][0]:.6f}")
    assert list_visible(chromium) == [3]
    assert chromium.find_element("id", "count").text == "1 of 4 shown"
    browser.press(chromium, "\ue00c")  # escape
    assert list_visible(chromium) == [0, 1, 2, 3]
    Select(chromium.find_element("id", "label")).select_by_visible_text("1")
    assert list_visible(chromium) == [1]


def test_choices_are_set_by_keys_and_saved(chromium: Any, folder: Path) -> None:
    chromium.get((folder / "suspects.html").as_uri())
    buttons = {name: chromium.find_element("id", name) for name in ("csv", "json")}
    assert not any(button.is_enabled() for button in buttons.values())
    browser.press(chromium, "j", "x", "j", "j", " ", "j", "x", "x")
    browser.click(chromium, chromium.find_elements("class name", "chosen")[-1])
    wanted = [record for at, record in enumerate(json.loads((folder / "suspects.json").read_text())) if at in (0, 2, 8)]
    assert chromium.find_element("id", "count").text == f"{LISTED} of {LISTED} shown, 3 chosen"
    browser.click(chromium, chromium.find_element("id", "chosen-only"))
    assert list_visible(chromium) == [0, 2, 8]
    for button in buttons.values():
        browser.click(chromium, button)
    saved = [browser.wait_for_file(folder / "saved" / f"chosen.{name}") for name in ("csv", "json")]
    with saved[0].open(newline="") as file:
        assert [(int(row["row"]), float(row["score"]), row["text"]) for row in csv.DictReader(file)] == [
            (record["row"], record["score"], record["text"]) for record in wanted
        ]
    read = json.loads(saved[1].read_text())
    assert [{name: row[name] for name in wanted[0]} for row in read] == wanted
    assert [row["label"] for row in read] == [str(record["row"] % 3) for record in wanted]
    # A page that is opened again restores the choices.
    chromium.get((folder / "suspects.html").as_uri())
    assert chromium.find_element("id", "count").text == f"{LISTED} of {LISTED} shown, 3 chosen"


@pytest.mark.parametrize("name", ["answers", "suspects"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast_in_light_and_dark(chromium: Any, folder: Path, name: str, dark: bool) -> None:
    browser.set_window(chromium, 1200, 900, dark=dark)
    chromium.get((folder / f"{name}.html").as_uri())
    assert chromium.execute_script(browser.CONTRASTS) == []
    ground = "return getComputedStyle(document.body).backgroundColor"
    assert (chromium.execute_script(ground) == "rgb(16, 20, 26)") is dark


@pytest.mark.parametrize("width", [360, 1200])
def test_no_page_is_wider_than_its_window(chromium: Any, folder: Path, width: int) -> None:
    browser.set_window(chromium, width, 800)
    chromium.get((folder / "answers.html").as_uri())
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_screen_reader_finds_names(chromium: Any, folder: Path) -> None:
    chromium.get((folder / "suspects.html").as_uri())
    chromium.execute_cdp_cmd("Accessibility.enable", {})
    nodes = chromium.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = [(node.get("role", {}).get("value"), node.get("name", {}).get("value")) for node in nodes]
    named_roles = ("checkbox", "searchbox", "combobox", "button", "image", "article", "heading", "search")
    assert [role for role, name in roles if role in named_roles and not name] == []
    assert {"main", "banner", "contentinfo", "search", "article", "heading"} <= {str(role) for role, _ in roles}
    assert any(role == "image" and name.startswith('image: label 0, row "0", <b>') for role, name in roles)
    chromium.execute_cdp_cmd("Accessibility.disable", {})


def test_the_page_can_be_printed(chromium: Any, folder: Path) -> None:
    browser.set_window(chromium, 1200, 900, dark=True)
    chromium.get((folder / "answers.html").as_uri())
    printed = chromium.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    document = base64.b64decode(printed["data"])
    assert document.startswith(b"%PDF")
    # Images are printed although backgrounds are not.
    assert b"/Subtype /Image" in document
