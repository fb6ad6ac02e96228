"""Screenshots of the explorer for the documentation: answers, the parts of a score, and suspects.

Trains a small model of digits, builds an index, serves it and opens its pages in Chromium, which takes a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common.paths import FIGURES, add_tests_to_path
from examples import digits
from examples.explorer import build_once
from tracin_ann.serve import IndexLocation, Settings, create_app

add_tests_to_path()

import browser  # noqa: E402
from explorer import listen  # noqa: E402

OUTPUT = "docs/figures/explorer-*.png"
WIDTH, LONGEST_WAIT = 1280, 60.0
SETTLED = """
for (const image of document.images) image.loading = 'eager';
return !document.getElementById('progress') && Array.from(document.images).every((image) => image.complete)"""


@dataclass(frozen=True)
class Shot:
    """A page to save: its address, the height of the window, the colour scheme, and keys to press first."""

    name: str
    address: str
    height: int
    dark: bool = False
    keys: Sequence[str] = ()


SHOTS = (
    Shot("query", "/query?rows=0-1&k=10&rerank=exact", 1000),
    Shot("pair", "/pair?row=543&query=1", 800),
    Shot("suspects", "/suspects", 1060, True, ("j", "2", "1", "j", "k")),
)


def save_shot(driver: Any, address: str, shot: Shot) -> None:
    """Save the screenshot of a page whose jobs have ended."""
    browser.set_window(driver, WIDTH, shot.height, dark=shot.dark)
    driver.get(address + shot.address)
    wait_for_page(driver)
    for key in shot.keys:
        browser.press(driver, key)
        time.sleep(0.5)
    if shot.keys:
        driver.execute_script("window.scrollTo(0, 0)")
    wait_for_page(driver)
    path = FIGURES / f"explorer-{shot.name}.png"
    driver.save_screenshot(str(path))
    print(path)


def wait_for_page(driver: Any) -> None:
    until = time.monotonic() + LONGEST_WAIT
    while not driver.execute_script(SETTLED):
        if time.monotonic() > until:
            raise TimeoutError(driver.current_url)
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"), help="directory for the model and the index")
    options = parser.parse_args()
    if browser.find_missing():
        raise SystemExit(browser.find_missing())
    task, named = f"{Path(digits.__file__)}:task", {"runs": f"{options.runs}/seed0", "seed": "0"}
    location = IndexLocation(build_once(task, options.runs, named), task, named)
    with TemporaryDirectory() as folder:
        app = create_app(location, Settings(decisions=Path(folder) / "decisions.sqlite"))
        with listen(app) as address, browser.open_browser() as driver:
            for shot in SHOTS:
                save_shot(driver, address, shot)


if __name__ == "__main__":
    main()
