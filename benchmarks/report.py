"""How large a report of 1,000 queries is, and how long Chromium takes to open it.

`python -m benchmarks.report --data DIR` (DIR holds mnist.npz and cifar10_jpeg.npz): linear models of pictures, 10
proponents and 10 opponents a query. `open_s` is from asking for the page until its first frame was drawn after all of
it was read, `cpu_s` the processor time of the page's process until then, which does not depend on what else the machine
does (`load`: its load average); `jump_s`, from there to the last query, scrolled to and drawn.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
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

from benchmarks import common
from tracin_ann import BuildConfig, Checkpoint, Description, InfluenceIndex, QueryOptions, Task, build, write_report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

import browser  # noqa: E402

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


def digits(data: str) -> list[Row]:
    with np.load(f"{data}/mnist.npz") as arrays:
        pixels, labels = arrays["x_train"][: TRAIN + QUERIES], arrays["y_train"].tolist()
    return [(torch.from_numpy(pixels[i])[None].float() / 255, labels[i]) for i in range(TRAIN + QUERIES)]


def photographs(data: str) -> list[Row]:
    from PIL import Image  # noqa: PLC0415

    with np.load(f"{data}/cifar10_jpeg.npz") as arrays:
        starts, jpeg, labels = arrays["offsets_train"], arrays["jpeg_train"], arrays["y_train"].tolist()
    opened = (Image.open(io.BytesIO(jpeg[starts[i] : starts[i + 1]].tobytes())) for i in range(TRAIN + QUERIES))
    pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255 for picture in opened]
    return [(pixels[i], labels[i]) for i in range(TRAIN + QUERIES)]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0].flatten(1)), batch[1], reduction="none")


def made(rows: list[Row], folder: Path) -> InfluenceIndex:
    checkpoints = []
    for epoch in range(3):
        torch.manual_seed(epoch)
        torch.save(nn.Linear(rows[0][0].numel(), 10).state_dict(), folder / f"epoch-{epoch}.pt")
        checkpoints.append(Checkpoint(folder / f"epoch-{epoch}.pt", 0.1))
    task = Task(
        model=lambda: nn.Linear(rows[0][0].numel(), 10),
        loss=loss,
        train_data=lambda: rows[:TRAIN],
        query_data=lambda: rows[TRAIN:],
        checkpoints=checkpoints,
        describe=lambda row: Description(image=row[0]),
        columns=lambda row: {"label": row[1]},
    )
    build(task, folder / "index", BuildConfig(dim=256))
    return InfluenceIndex.open(folder / "index", task)


def results(data: str) -> Iterator[dict[str, Any]]:
    sources: dict[str, Callable[[str], list[Row]]] = {"MNIST, 28 x 28": digits, "CIFAR-10, 3 x 32 x 32": photographs}
    for name, read in sources.items():
        with tempfile.TemporaryDirectory() as folder:
            index = made(read(data), Path(folder))
            answers = index.query(range(QUERIES), options=QueryOptions(k=K, cosine=True))
            began = time.perf_counter()
            page = write_report(answers, Path(folder) / "report.html", index)
            wrote = time.perf_counter() - began
            opens, cpus, jumps = zip(*(opened(page) for _ in range(TRIES)), strict=True)
            yield {
                "pictures": name,
                "distinct": len(re.findall(rb"^\.p\d+\{background", page.read_bytes(), re.MULTILINE)),
                "MB": round(page.stat().st_size / 1e6, 1),
                "write_s": round(wrote, 1),
                "open_s": round(median(opens), 2),
                "open_s_worst": round(max(opens), 2),
                "cpu_s": round(median(cpus), 2),
                "jump_s": round(median(jumps), 2),
                "load": round(os.getloadavg()[0], 1),
            }


def opened(page: Path) -> tuple[float, float, float]:
    """Return the seconds until a page was drawn, of its process's processor, and from there until its end was drawn."""
    with browser.opened() as driver:
        browser.sized(driver, 1280, 1000)
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
    if browser.missing():
        raise SystemExit(browser.missing())
    with browser.opened() as driver:
        version = driver.capabilities["browserVersion"]
    settings = {"train": TRAIN, "queries": QUERIES, "k": K, "tries": TRIES, "chromium": version}
    common.reported("report", settings, results(options.data))


if __name__ == "__main__":
    main()
