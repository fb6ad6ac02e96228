"""Headless Chromium of Debian, driven by Selenium: pages from disk, and their network requests."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = "chromium", "chromedriver"
# Without these, Chromium sends requests for updates, lists and the time.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--force-color-profile=srgb", "--hide-scrollbars"),
)
# Relative luminance and contrast as WCAG 2.2 defines them; colours are laid over the first opaque one behind.
CONTRASTS = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return Array.from(canvas.getImageData(0, 0, 1, 1).data); };
const linear = (v) => v <= .03928 * 255 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
const light = (c) => { const [r, g, b] = c.map(linear);
  return .2126 * r + .7152 * g + .0722 * b; };
const behind = (at) => { let over = [];
  for (; at; at = at.parentElement) { const c = rgb(getComputedStyle(at).backgroundColor);
    over.push(c); if (c[3] === 255) break; }
  return over.reverse().reduce((under, c) => under.map((v, i) => v + (c[i] - v) * c[3] / 255), [255, 255, 255]); };
const found = [];
for (const at of document.querySelectorAll('body *')) {
  const own = Array.from(at.childNodes).some((node) => node.nodeType === 3 && node.nodeValue.trim());
  if (!own || at.closest('script, style, .vh, .skip, [disabled], svg') || !at.getClientRects().length) continue;
  const one = light(rgb(getComputedStyle(at).color).slice(0, 3)), other = light(behind(at));
  const contrast = (Math.max(one, other) + .05) / (Math.min(one, other) + .05);
  if (contrast < 4.5) found.push(`${at.tagName} ${at.className}: ${contrast.toFixed(2)}`);
}
return found;
"""


def find_missing() -> str:
    """Return why no browser can be started, or "" if one can."""
    try:
        import selenium  # noqa: F401, PLC0415
    except ImportError:
        return "no selenium; pip install -e '.[dev]'"
    names = [name for name in (CHROMIUM, DRIVER) if shutil.which(name) is None]
    return f"no {' and no '.join(names)} on this machine" if names else ""


@contextmanager
def open_browser(downloads: Path | None = None) -> Iterator[Any]:
    """Yield a browser whose console and network are logged; files are saved in `downloads`."""
    from selenium import webdriver  # noqa: PLC0415
    from selenium.webdriver.chrome.service import Service  # noqa: PLC0415

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which(CHROMIUM))
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which(DRIVER))))
    try:
        yield driver
    finally:
        driver.quit()


def take_requests(driver: Any) -> list[str]:
    """Return the URLs requested since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def set_window(driver: Any, width: int, height: int, *, dark: bool = False) -> None:
    """Set the size of the window and the colour scheme."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def click(driver: Any, element: Any) -> None:
    """Click an element in the middle of the window: at its edge, a scroll that has not ended can move it away."""
    driver.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", element)
    element.click()


def press(driver: Any, *keys: str) -> None:
    """Press keys, one after the other."""
    from selenium.webdriver import ActionChains  # noqa: PLC0415

    for key in keys:
        ActionChains(driver).send_keys(key).perform()


def wait_for_file(path: Path) -> Path:
    """Wait for a downloaded file and return its path; Chromium reserves the name by an empty file."""
    until = time.monotonic() + 60
    while not (path.is_file() and path.stat().st_size):
        assert time.monotonic() < until, f"{path} was not saved"
        time.sleep(0.05)
    return path
