"""Size of an HTML report of 1,000 queries, and the time that Chromium needs to open it.

The reports show linear models of images, with 10 proponents and 10 opponents per query. `open_s` is the time from the
request to the first frame after the complete page is read. `cpu_s` is the CPU time of the page's process until then; it
depends less on the load of the machine (`load`, its load average). `jump_s` is the time to scroll to the last query and
draw it.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.common.paths import add_tests_to_path
from benchmarks.common.results import report_results
from tracin_ann import BuildConfig, Checkpoint, Description, InfluenceIndex, QueryOptions, Task, build, write_report

add_tests_to_path()

import browser  # noqa: E402

RESULT = "report"
TRAIN, QUERIES, K, TRIES = 10_000, 1000, 10, 5
Row = tuple[torch.Tensor, int]
DRAWN = """
const done = arguments[arguments.length - 1];
requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())));
"""
JUMP = """
const done = arguments[arguments.length - 1], began = performance.now();
document.querySelector('.item:last-of-type').scrollIntoView();
requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
"""


def read_digits(data: str) -> list[Row]:
    """Read MNIST images and labels."""
    with np.load(f"{data}/mnist.npz") as arrays:
        pixels, labels = arrays["x_train"][: TRAIN + QUERIES], arrays["y_train"].tolist()
    return [(torch.from_numpy(pixels[i])[None].float() / 255, labels[i]) for i in range(TRAIN + QUERIES)]


def read_photographs(data: str) -> list[Row]:
    """Read CIFAR-10 images and labels."""
    from PIL import Image  # noqa: PLC0415

    with np.load(f"{data}/cifar10_jpeg.npz") as arrays:
        starts, jpeg, labels = arrays["offsets_train"], arrays["jpeg_train"], arrays["y_train"].tolist()
    images = (Image.open(io.BytesIO(jpeg[starts[i] : starts[i + 1]].tobytes())) for i in range(TRAIN + QUERIES))
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in images]
    return [(pixels[i], labels[i]) for i in range(TRAIN + QUERIES)]


def compute_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0].flatten(1)), batch[1], reduction="none")


def build_index(rows: list[Row], folder: Path) -> InfluenceIndex:
    """Build an index of linear models, and open it."""
    checkpoints = []
    for epoch in range(3):
        torch.manual_seed(epoch)
        torch.save(nn.Linear(rows[0][0].numel(), 10).state_dict(), folder / f"epoch-{epoch}.pt")
        checkpoints.append(Checkpoint(folder / f"epoch-{epoch}.pt", 0.1))
    task = Task(
        model=lambda: nn.Linear(rows[0][0].numel(), 10),
        loss=compute_loss,
        train_data=lambda: rows[:TRAIN],
        query_data=lambda: rows[TRAIN:],
        checkpoints=checkpoints,
        describe=lambda row: Description(image=row[0]),
        columns=lambda row: {"label": row[1]},
    )
    build(task, folder / "index", BuildConfig(dim=256))
    return InfluenceIndex.open(folder / "index", task)


def measure_reports(data: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of each data set's report."""
    sources: dict[str, Callable[[str], list[Row]]] = {
        "MNIST, 28 x 28": read_digits,
        "CIFAR-10, 3 x 32 x 32": read_photographs,
    }
    for name, read in sources.items():
        with tempfile.TemporaryDirectory() as folder:
            index = build_index(read(data), Path(folder))
            answers = index.query(range(QUERIES), options=QueryOptions(k=K, cosine=True))
            start_s = time.perf_counter()
            page = write_report(answers, Path(folder) / "report.html", index)
            write_s = time.perf_counter() - start_s
            opens, cpus, jumps = zip(*(open_page(page) for _ in range(TRIES)), strict=True)
            yield {
                "pictures": name,
                "distinct": len(re.findall(rb"^\.p\d+\{background", page.read_bytes(), re.MULTILINE)),
                "MB": round(page.stat().st_size / 1e6, 1),
                "write_s": round(write_s, 1),
                "open_s": round(median(opens), 2),
                "open_s_worst": round(max(opens), 2),
                "cpu_s": round(median(cpus), 2),
                "jump_s": round(median(jumps), 2),
                "load": round(os.getloadavg()[0], 1),
            }


def open_page(page: Path) -> tuple[float, float, float]:
    """Return the seconds until the page is drawn, its CPU seconds until then, and the seconds to show its end."""
    with browser.open_browser() as driver:
        browser.set_window(driver, 1280, 1000)
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        driver.get(page.as_uri())
        drawn = driver.execute_async_script(DRAWN) / 1e3
        metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        cpu = next(metric["value"] for metric in metrics if metric["name"] == "ProcessTime")
        return drawn, cpu, driver.execute_async_script(JUMP) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of mnist.npz and cifar10_jpeg.npz")
    options = parser.parse_args()
    if browser.find_missing():
        raise SystemExit(browser.find_missing())
    with browser.open_browser() as driver:
        version = driver.capabilities["browserVersion"]
    settings = {"train": TRAIN, "queries": QUERIES, "k": K, "tries": TRIES, "chromium": version}
    report_results(RESULT, settings, measure_reports(options.data))


if __name__ == "__main__":
    main()
