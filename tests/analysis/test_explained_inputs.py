"""Explanations of examples that are not in the index, used after the examples are no longer lent."""

from __future__ import annotations

import pytest

from tasks.toy import CONFIG, cross_entropy, make_rows, make_toy_task
from tracin_ann import Description, InfluenceIndex, build, write_report
from tracin_ann.analysis import explain

ROWS = make_rows(3, seed=5)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    task = make_toy_task(
        folder,
        token_losses=lambda model, batch: cross_entropy(model, batch)[:, None],
        describe=lambda row: Description(text=f"{float(row[0][0]):.6f}", tokens=[f"first {float(row[0][0]):.6f}"]),
    )
    build(task, folder / "out", CONFIG)
    return InfluenceIndex.open(folder / "out", task, device="cpu")


@pytest.mark.parametrize("by", ["layer", "token"])
def test_an_explanation_describes_its_input(index, by):
    with index.lend(ROWS):
        found = explain(index, 3, 1, "input", by=by)
    assert found.texts("input", 1) == f"{float(ROWS[1][0][0]):.6f}"
    with index.lend(make_rows(3, seed=6)):
        assert found.texts("input", 1) == f"{float(ROWS[1][0][0]):.6f}"
    assert found.texts("train", 3) == f"{float(make_rows(10)[3][0][0]):.6f}"


def test_a_report_shows_the_tokens_of_an_input(index, tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    with index.lend(ROWS):
        found = explain(index, 3, 1, "input", by="token")
    page = write_report(found, tmp_path / "tokens.html", index).read_text()
    assert f"first {float(ROWS[1][0][0]):.6f}" in page
    assert "<h3>input 1</h3>" in page
