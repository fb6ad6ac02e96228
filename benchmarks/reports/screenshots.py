"""Screenshots of reports for the documentation: images, text, tabular data and suspects.

Trains small models, builds indexes, writes the reports and opens them in Chromium, which takes some minutes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.paths import FIGURES, add_tests_to_path
from examples import mnist, sst2, tabular
from tracin_ann import BuildConfig, Description, InfluenceIndex, QueryOptions, Task, build, write_report
from tracin_ann.analysis import find_mislabelled

add_tests_to_path()

import browser  # noqa: E402

OUTPUT = "docs/figures/report-*.png"
WIDTH = 1280
OPTIONS = QueryOptions(k=10, rerank="exact", candidates=60)


def report_images(data: str, runs: Path) -> tuple[Path, Path]:
    """Write a report of digits and one of suspects, and return their paths."""
    out, rows = str(runs / "mnist"), 3000
    if not (runs / "mnist" / "epoch-2.pt").is_file():
        mnist.train(f"{data}/mnist.npz", out, rows, 0)
    index = build_index(
        replace(mnist.task(f"{data}/mnist.npz", out, str(rows)), describe=describe_digit), runs / "mnist-index"
    )
    wrong = find_mistakes(index, 400)
    answers = index.query(wrong[:12], options=OPTIONS)
    page = write_report(answers, runs / "images.html", index, "Training digits behind twelve wrong predictions")
    suspects = find_mislabelled(index, k=60)
    return page, write_report(suspects, runs / "suspects.html", index, "MNIST: training labels that are probably wrong")


def describe_digit(row: mnist.Row) -> Description:
    return Description(text=str(row[1]), image=row[0])


def find_mistakes(index: InfluenceIndex, among: int) -> list[int]:
    """Return the queries that the last checkpoint misclassifies."""
    with index.runner.model() as model:
        model.load(len(index.task.checkpoints) - 1)
        images, labels = torch.utils.data.default_collate([index.runner.data("query")[i] for i in range(among)])
        with torch.no_grad():
            return [int(i) for i in (model.module(images).argmax(1) != labels).nonzero().flatten()]


def report_text(data: str, runs: Path) -> Path:
    """Write a report of sentences with the contribution of each word to `positive`."""
    out, rows = runs / "sst2", 4000
    if not (out / "epoch-4.pt").is_file():
        sst2.train(data, str(out), rows)
    task = sst2.task(data, str(out), str(rows))
    train_rows, _, _ = sst2.read(data, rows)
    word_ids, state = sst2.vocabulary(train_rows), torch.load(out / "epoch-4.pt", weights_only=True)
    direction = state["out.weight"][1] - state["out.weight"][0]

    def describe(row: sst2.Row) -> Description:
        words = row[0].split()
        scores = [float(state["words.weight"][word_ids.get(word, 0)] @ direction) for word in words]
        return Description(text=row[0], tokens=words, token_scores=scores)

    values_by_column = {"label": lambda row: sst2.NAMES[row[1]]}
    columns: Any = lambda row: {name: of(row) for name, of in values_by_column.items()}  # noqa: E731
    index = build_index(replace(task, describe=describe, columns=columns), runs / "sst2-index")
    options = replace(OPTIONS, k=5)
    return write_report(
        index.query(range(2, 10), options=options), runs / "text.html", index, "Training reviews behind predictions"
    )


def report_tabular(runs: Path) -> Path:
    """Write a report of tumours."""
    out = str(runs / "tabular")
    tabular.train(out)

    def describe(row: tabular.Row) -> Description:
        values = tabular.TABLE.data[row[2]].tolist()
        return Description(table=dict(zip(map(str, tabular.TABLE.feature_names), values, strict=True)))

    task = tabular.task(out)
    columns: Any = lambda row: {"label": str(tabular.TABLE.target_names[row[1]])}  # noqa: E731
    index = build_index(replace(task, describe=describe, columns=columns), runs / "tabular-index")
    options = replace(OPTIONS, k=3)
    return write_report(
        index.query(range(6), options=options), runs / "tabular.html", index, "Training rows behind predictions"
    )


def build_index(task: Task, out: Path) -> InfluenceIndex:
    """Build an index, and open it."""
    build(task, out, BuildConfig(dim=1024))
    return InfluenceIndex.open(out, task)


def save_screenshots(pages: dict[str, tuple[Path, bool, str, int]]) -> None:
    """Save screenshots by name: the page, whether dark, a script that runs first, and the height in pixels."""
    with browser.open_browser() as driver:
        for name, (page, dark, script, height) in pages.items():
            browser.set_window(driver, WIDTH, height, dark=dark)
            driver.get(page.resolve().as_uri())
            driver.execute_script(script)
            driver.save_screenshot(str(FIGURES / f"report-{name}.png"))
            print(FIGURES / f"report-{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of mnist.npz, sst2_train.tsv and sst2_dev.tsv")
    parser.add_argument("--runs", type=Path, default=Path("runs/reports"), help="directory for models and reports")
    options = parser.parse_args()
    if browser.find_missing():
        raise SystemExit(browser.find_missing())
    digits, suspects = report_images(options.data, options.runs)
    press_keys = (
        "for (const key of 'jxjjx') document.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
    )
    save_screenshots(
        {
            "images": (digits, False, "", 1180),
            "text": (
                report_text(options.data, options.runs),
                False,
                "document.querySelector('#q0').scrollIntoView()",
                1000,
            ),
            "tabular": (report_tabular(options.runs), True, "document.querySelector('#q0').scrollIntoView()", 1000),
            "suspects": (suspects, True, press_keys, 1000),
        }
    )


if __name__ == "__main__":
    main()
