"""Pictures of reports for the documentation: images, text, a table, suspects, in docs/figures.

`python benchmarks/report_screenshots.py --data DIR` (DIR holds mnist.npz and sst2_train.tsv, sst2_dev.tsv) trains small
models, indexes them, writes their reports and opens these in Chromium: some minutes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

import mnist  # noqa: E402
import sst2  # noqa: E402
import tabular  # noqa: E402

import browser  # noqa: E402
from tracin_ann import BuildConfig, Description, InfluenceIndex, QueryOptions, Task, build, write_report  # noqa: E402
from tracin_ann.analysis import find_mislabelled  # noqa: E402

FIGURES = ROOT / "docs" / "figures"
WIDTH = 1280
OPTIONS = QueryOptions(k=10, rerank="exact", candidates=60)


def images(data: str, runs: Path) -> tuple[Path, Path]:
    """Return a report of digits and one of suspects."""
    out, rows = str(runs / "mnist"), 3000
    if not (runs / "mnist" / "epoch-2.pt").is_file():
        mnist.train(f"{data}/mnist.npz", out, rows, 0)
    index = indexed(replace(mnist.task(f"{data}/mnist.npz", out, str(rows)), describe=digit), runs / "mnist-index")
    wrong = mistakes(index, 400)
    answers = index.query(wrong[:12], options=OPTIONS)
    page = write_report(answers, runs / "images.html", index, "Why twelve digits were misread")
    suspects = find_mislabelled(index, k=60)
    return page, write_report(suspects, runs / "suspects.html", index, "MNIST: training labels that look wrong")


def digit(row: mnist.Row) -> Description:
    return Description(text=str(row[1]), image=row[0])


def mistakes(index: InfluenceIndex, among: int) -> list[int]:
    """Return the queries that the last checkpoint classifies wrongly."""
    with index.passes.model() as model:
        model.load(len(index.task.checkpoints) - 1)
        pictures, labels = torch.utils.data.default_collate([index.passes.data("query")[i] for i in range(among)])
        with torch.no_grad():
            return [int(i) for i in (model.module(pictures).argmax(1) != labels).nonzero().flatten()]


def text(data: str, runs: Path) -> Path:
    """Return a report of sentences, each word with what it adds to `positive`."""
    out, rows = runs / "sst2", 4000
    if not (out / "epoch-4.pt").is_file():
        sst2.train(data, str(out), rows)
    task = sst2.task(data, str(out), str(rows))
    train_rows, _, _ = sst2.read(data, rows)
    places, state = sst2.vocabulary(train_rows), torch.load(out / "epoch-4.pt", weights_only=True)
    direction = state["out.weight"][1] - state["out.weight"][0]

    def describe(row: sst2.Row) -> Description:
        words = row[0].split()
        scores = [float(state["words.weight"][places.get(word, 0)] @ direction) for word in words]
        return Description(text=row[0], tokens=words, token_scores=scores)

    named = {"label": lambda row: sst2.NAMES[row[1]]}
    columns: Any = lambda row: {name: of(row) for name, of in named.items()}  # noqa: E731
    index = indexed(replace(task, describe=describe, columns=columns), runs / "sst2-index")
    options = replace(OPTIONS, k=5)
    return write_report(index.query(range(2, 10), options=options), runs / "text.html", index, "What reviews rest on")


def table(runs: Path) -> Path:
    """Return a report of tumours."""
    out = str(runs / "tabular")
    tabular.train(out)

    def describe(row: tabular.Row) -> Description:
        values = tabular.TABLE.data[row[2]].tolist()
        return Description(table=dict(zip(map(str, tabular.TABLE.feature_names), values, strict=True)))

    task = tabular.task(out)
    columns: Any = lambda row: {"label": str(tabular.TABLE.target_names[row[1]])}  # noqa: E731
    index = indexed(replace(task, describe=describe, columns=columns), runs / "tabular-index")
    options = replace(OPTIONS, k=3)
    return write_report(index.query(range(6), options=options), runs / "tabular.html", index, "What tumours rest on")


def indexed(task: Task, out: Path) -> InfluenceIndex:
    build(task, out, BuildConfig(dim=1024))
    return InfluenceIndex.open(out, task)


def photographed(pages: dict[str, tuple[Path, bool, str, int]]) -> None:
    """Save pictures of pages by name: the file, whether dark, where to scroll, and how high."""
    with browser.opened() as driver:
        for name, (page, dark, at, height) in pages.items():
            browser.sized(driver, WIDTH, height, dark=dark)
            driver.get(page.resolve().as_uri())
            driver.execute_script(at)
            driver.save_screenshot(str(FIGURES / f"report-{name}.png"))
            print(FIGURES / f"report-{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of mnist.npz and the sentences")
    parser.add_argument("--runs", type=Path, default=Path("runs/reports"), help="directory for models and reports")
    options = parser.parse_args()
    if browser.missing():
        raise SystemExit(browser.missing())
    digits, suspects = images(options.data, options.runs)
    choose = "for (const key of 'jxjjx') document.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
    photographed(
        {
            "images": (digits, False, "", 1180),
            "text": (text(options.data, options.runs), False, "document.querySelector('#q0').scrollIntoView()", 1000),
            "tabular": (table(options.runs), True, "document.querySelector('#q0').scrollIntoView()", 1000),
            "suspects": (suspects, True, choose, 1000),
        }
    )


if __name__ == "__main__":
    main()
