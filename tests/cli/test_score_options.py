"""`--score` and `--damping` of the commands, and their results in every format."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pandas as pd
import pytest
from click.testing import Result

import invocation
from pages import Page
from paths import ROOT, SUPPORT
from tasks.toy import CONFIG, RATES, Toy, make_rows, make_toy_task, save_checkpoints
from tracin_ann import Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.analysis import explain, find_hubs, find_mislabelled, select
from tracin_ann.cli.explain import main as explain_command
from tracin_ann.cli.hubs import main as hubs_command
from tracin_ann.cli.info import main as info_command
from tracin_ann.cli.mislabelled import main as mislabelled_command
from tracin_ann.cli.query import main as query_command
from tracin_ann.cli.select import main as select_command

N, QUERIES = 30, 6
TASK = """
import sys
sys.path[:0] = {paths!r}
from cli.test_score_options import make_task as task
"""


def make_task(folder: str, steps: str = "100") -> Task:
    paths = [Path(folder) / f"checkpoint{c}.pt" for c in range(len(RATES))]
    return make_toy_task(
        Path(folder),
        checkpoints=[Checkpoint(p, rate, steps=float(steps)) for p, rate in zip(paths, RATES, strict=True)],
        train_data=lambda: make_rows(N),
        query_data=lambda: make_rows(QUERIES, 2),
        columns=lambda row: {"label": row[1]},
        loss_is_nll=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    save_checkpoints(Toy(), folder)
    (folder / "task_of_scores.py").write_text(TASK.format(paths=[str(SUPPORT), str(ROOT / "tests")]))
    build(make_task(str(folder)), folder / "index", CONFIG)
    return folder


@pytest.fixture(scope="module")
def index(folder: Path) -> InfluenceIndex:
    return InfluenceIndex.open(folder / "index", make_task(str(folder)), device="cpu")


def run(folder: Path, command: click.Command, *words: object) -> Result:
    named = ("--task", f"{folder / 'task_of_scores.py'}:task", "--task-arg", f"folder={folder}", "--device", "cpu")
    return invocation.run(command, folder / "index", *named, *words)


def test_a_query_without_a_score_uses_the_default_and_names_it(folder: Path, index: InfluenceIndex) -> None:
    result = run(folder, query_command, "--ids", "0", "-k", 2, "--format", "jsonl")
    assert json.loads(result.stdout) == index.query([0], options=QueryOptions(k=2)).lines()[0]
    assert json.loads(result.stdout)["score"] == "gauss-newton"
    assert "search: " in result.stderr
    assert "score gauss-newton, damping 1 / (learning rate × steps); exact scan" in " ".join(result.stderr.split())


@pytest.mark.parametrize("score", ["tracin", "cosine", "fisher", "gauss-newton", "trak", "trackstar"])
def test_the_score_of_a_query_is_an_option(folder: Path, index: InfluenceIndex, score: str) -> None:
    result = run(folder, query_command, "--ids", "0-5", "-k", 3, "--score", score, "--format", "jsonl")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines == index.query(range(6), options=QueryOptions(k=3, score=score)).lines()  # type: ignore[arg-type]
    assert [line.get("score", "tracin") for line in lines] == [score] * 6
    assert ("amount" in lines[0]["proponents"][0]) is (score in ("fisher", "gauss-newton", "trak"))


def test_exact_scores_use_a_curvature_over_all_parameters(folder: Path, index: InfluenceIndex) -> None:
    result = run(folder, query_command, "--ids", "0", "-k", 3, "--rerank", "exact", "--format", "jsonl")
    assert json.loads(result.stdout) == index.query([0], options=QueryOptions(k=3, rerank="exact")).lines()[0]
    assert f"exact scores with the curvature of {N} rows" in " ".join(result.stderr.split())
    full = index.query([0], options=QueryOptions(k=3, exact=True))[0]
    assert [hit.row for hit in full.proponents] == [hit["row"] for hit in json.loads(result.stdout)["proponents"]]


def test_files_have_the_estimated_amounts(folder: Path, tmp_path: Path) -> None:
    wanted = run(folder, query_command, "--ids", "1", "-k", 3, "--damping", "0.01", "--format", "jsonl")
    amounts = [hit["amount"] for kind in ("proponents", "opponents") for hit in json.loads(wanted.stdout)[kind]]
    for name, read in (("a.csv", pd.read_csv), ("a.parquet", pd.read_parquet)):
        given = ("--ids", "1", "-k", 3, "--damping", "0.01", "--output", tmp_path / name)
        assert run(folder, query_command, *given).exit_code == 0
        assert read(tmp_path / name)["amount"].tolist() == pytest.approx(amounts)
    # The sign of an amount is that of the score: without a proponent, the loss of the query rises.
    assert [np.sign(amount) for amount in amounts] == [1] * 3 + [-1] * 3
    assert run(folder, query_command, "--ids", "1", "--score", "tracin", "--output", tmp_path / "b.csv").exit_code == 0
    assert "amount" not in pd.read_csv(tmp_path / "b.csv").columns


def test_analyses_use_the_score(folder: Path, index: InfluenceIndex) -> None:
    options = QueryOptions(score="fisher", damping=0.02)
    result = run(folder, hubs_command, "--score", "fisher", "--damping", 0.02, "-k", 3, "--format", "jsonl")
    expected = find_hubs(index, k=3, options=options).ranked("proponents", 20)
    assert [json.loads(line) for line in result.stdout.splitlines()] == expected.lines()
    score_QN = index.score_matrix("query", range(QUERIES), options)
    result = run(folder, select_command, "--n", 5, "--method", "mean", "--score", "fisher", "--damping", 0.02)
    assert result.exit_code == 0
    found = select(index, 5, method="mean", score="fisher", damping=0.02)
    assert found.rows == np.argsort(-score_QN.mean(axis=0), kind="stable")[:5].tolist()
    assert [row.score for row in found] == pytest.approx(sorted(score_QN.mean(axis=0), reverse=True)[:5], rel=1e-4)
    ranked = find_mislabelled(index, by="self-influence", score="gauss-newton")
    own_N = np.diag(index.score_matrix("train", range(N), QueryOptions(score="gauss-newton")))
    assert {suspect.row: suspect.self_influence for suspect in ranked} == pytest.approx(
        dict(enumerate(own_N)), rel=1e-4
    )
    damped = find_mislabelled(index, by="self-influence", score="fisher", damping=0.5)
    words = ("--by", "self-influence", "--score", "fisher", "--damping", 0.5, "-k", len(damped), "--format", "jsonl")
    lines = run(folder, mislabelled_command, *words).stdout.splitlines()
    assert [json.loads(text)["row"] for text in lines] == [suspect.row for suspect in damped]
    assert {s.row: s.self_influence for s in damped} == {
        row.row: row.score for row in index.self_influence(score="fisher", damping=0.5)
    }
    line = run(folder, mislabelled_command, "--by", "self-influence", "--score", "gauss-newton", "--format", "jsonl")
    assert [json.loads(text)["row"] for text in line.stdout.splitlines()] == [suspect.row for suspect in ranked]


@pytest.mark.parametrize("score", ["tracin", "fisher", "gauss-newton"])
def test_an_explanation_splits_the_exact_score(folder: Path, index: InfluenceIndex, score: str) -> None:
    options = QueryOptions(k=2, score=score, rerank="exact")  # type: ignore[arg-type]
    (answer,) = index.query([3], options=options)
    for hit in answer.hits:
        found = explain(index, hit.row, 3, score=score)  # type: ignore[call-overload]
        assert found.score == pytest.approx(hit.score, rel=1e-4)
        assert found.stored_score == pytest.approx(hit.stored_score, rel=1e-5)
    words = ("--train-id", answer.hits[0].row, "--id", 3, "--score", score, "--format", "jsonl")
    lines = [json.loads(line) for line in run(folder, explain_command, *words).stdout.splitlines()]
    assert sum(line["contribution"] for line in lines) == pytest.approx(answer.hits[0].score, rel=1e-4)
    assert [line["layer"] for line in lines] == ["first", "first", "second", "second"] * len(RATES)


def test_explanations_of_normalised_rows_are_refused(folder: Path) -> None:
    refused = run(folder, explain_command, "--train-id", 1, "--id", 0, "--score", "trackstar")
    assert refused.exit_code == 2
    assert "the score cannot be split by layer: got the score trackstar" in " ".join(refused.stderr.split())


def test_self_influence_by_a_score_is_its_leverage(folder: Path, index: InfluenceIndex) -> None:
    words = ("--self-influence", "--score", "fisher", "-k", 4, "--format", "jsonl")
    lines = [json.loads(line) for line in run(folder, query_command, *words).stdout.splitlines()]
    assert lines == index.self_influence(4, score="fisher").lines()
    damped = run(folder, query_command, *words, "--damping", 0.5)
    lines = [json.loads(line) for line in damped.stdout.splitlines()]
    assert lines == index.self_influence(4, score="fisher", damping=0.5).lines()
    own_N = np.diag(index.score_matrix("train", range(N), QueryOptions(score="fisher", damping=0.5)))
    assert [line["score"] for line in lines] == pytest.approx(sorted(own_N, reverse=True)[:4], rel=1e-4)
    refused = run(folder, query_command, "--self-influence", "--damping", 0.5, "--score", "tracin")
    assert refused.exit_code == 2 and "--damping has no effect: got the score tracin" in refused.stderr
    refused = run(folder, query_command, "--self-influence", "--cosine")
    assert refused.exit_code == 2 and "the cosine of a row and itself is 1" in refused.stderr
    refused = run(folder, query_command, "--self-influence", "--score", "fisher", "--exact")
    assert refused.exit_code == 2 and "leverages are computed from the stored features" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--damping", "-1"), "bad --damping: got -1.0, expected a finite number above 0"),
        (("--score", "tracin", "--damping", "1"), "--damping has no effect: got the score tracin"),
        (("--score", "fisher", "--cosine"), "two scores: got --cosine and --score fisher"),
        (("--score", "trackstar", "--tokens"), "--tokens needs a score over all parameters"),
        (("--self-influence", "--damping", "1"), "--damping has no effect: got the score tracin"),
    ],
)
def test_options_without_a_meaning_are_refused(folder: Path, words: tuple[str, ...], message: str) -> None:
    given = () if "--self-influence" in words else ("--ids", "0")
    result = run(folder, query_command, *given, *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (select_command, ("--n", 3)),
        (hubs_command, ()),
        (explain_command, ("--train-id", 1, "--id", 0)),
        (query_command, ("--self-influence",)),
    ],
)
def test_two_scores_are_refused(folder: Path, command: click.Command, words: tuple[object, ...]) -> None:
    refused = run(folder, command, *words, "--score", "fisher", "--cosine")
    assert refused.exit_code == 2 and "two scores: got --cosine and --score fisher" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(("command", "words"), [(query_command, ("--self-influence",)), (mislabelled_command, ())])
def test_exact_leverages_are_refused(folder: Path, command: click.Command, words: tuple[object, ...]) -> None:
    refused = run(folder, command, *words, "--exact", "--score", "fisher")
    assert refused.exit_code == 2 and "computed from the stored features" in " ".join(refused.stderr.split())


def test_info_states_whether_the_sketch_suffices(folder: Path) -> None:
    shown = " ".join(invocation.run(info_command, folder / "index").stdout.split())
    assert "score: gauss-newton by default, damping 1 / (learning rate × steps)" in shown
    assert "curvature: effective dimension" in shown and f"from {N} rows" in shown


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("cosine", "cosine by default; --score names"),
        ("trackstar", "trackstar by default, damping 5e-4"),
    ],
)
def test_info_states_a_default_score_without_a_curvature_of_its_own(tmp_path: Path, score: str, expected: str) -> None:
    build(make_toy_task(tmp_path, score=score), tmp_path / "index", CONFIG)
    # The build computes the matrix of TrackStar too.
    kept = [path.name for path in (tmp_path / "index").glob("generation-*/curvature-*")]
    assert kept == (["curvature-fisher.npz"] if score == "trackstar" else [])
    assert expected in " ".join(invocation.run(info_command, tmp_path / "index").stdout.split())


def test_a_page_explains_the_score_and_shows_amounts(folder: Path, tmp_path: Path) -> None:
    assert run(folder, query_command, "--ids", "0", "--html", tmp_path / "page.html").exit_code == 0
    page = Page(tmp_path / "page.html")
    assert "by the score gauss-newton" in page.text and "without it, loss +" in page.text
    assert run(folder, query_command, "--ids", "0", "--score", "tracin", "--html", tmp_path / "t.html").exit_code == 0
    page = Page(tmp_path / "t.html")
    assert "to first order (TracInCP)" in page.text and "without it" not in page.text
