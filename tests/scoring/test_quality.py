"""Measured quality of an index and its use by queries: calibration, fidelity, error bars, strategies, filters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

import oracle
from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.cli.info import main as info
from tracin_ann.errors import TaskError, UsageError
from tracin_ann.operations import remove
from tracin_ann.scoring import ranking, strategy
from tracin_ann.scoring.exact import ExactScorer
from tracin_ann.scoring.quality import measure_first_use
from tracin_ann.search import FirstUseCost
from tracin_ann.search.calibration import Cost
from tracin_ann.store import FeatureStore
from tracin_ann.store.columns import RowFilter
from tracin_ann.store.manifest import FEATURES
from tracin_ann.types import PendingReads

N, QUERIES = 1200, 130
CONFIG = BuildConfig(dim=128, batch_size=100, device="cpu", index="ivf", target_recall=0.8)


def rows(n: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=g) * (1 + 3 * torch.rand(n, 1, generator=g))
    labels = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return [(x[i], int(labels[i])) for i in range(n)]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def columns(row: Any) -> dict[str, Any]:
    return {"label": row[1], "norm": float(row[0].norm()), "even": row[1] % 2 == 0, "file": f"kind-{row[1]}"}


def models(folder: Path) -> list[nn.Module]:
    nets = []
    for i in range(2):
        torch.manual_seed(i)
        nets.append(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
        torch.save(nets[-1].state_dict(), folder / f"{i}.pt")
    return nets


def task(folder: Path) -> Task:
    return Task(
        model=lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)),
        loss=loss,
        train_data=lambda: rows(N, 1),
        query_data=lambda: rows(QUERIES, 2),
        checkpoints=[Checkpoint(str(folder / f"{i}.pt"), learning_rate=rate) for i, rate in enumerate((0.3, 0.1))],
        columns=columns,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def true_scores(folder: Path) -> np.ndarray:
    """True scores [queries, rows] in float64."""
    made = models(folder)
    train, asked = ([oracle.gradients(m, loss, some) for m in made] for some in (rows(N, 1), rows(QUERIES, 2)))
    return oracle.tracin(torch.stack(asked, 1), torch.stack(train, 1), (0.3, 0.1))


@pytest.fixture(scope="module")
def index(folder: Path, true_scores: np.ndarray) -> InfluenceIndex:
    build(task(folder), folder / "index", CONFIG)
    return InfluenceIndex.open(folder / "index", task(folder), device="cpu")


def test_fidelity_equals_brute_force(index: InfluenceIndex, true_scores: np.ndarray) -> None:
    """With few rows, all are scored exactly: recall over all rows, errors in units of the sketch's deviation."""
    found = index.manifest.fidelity
    assert found is not None
    view = index.view().take(range(N)).astype(np.float64)
    queries = index.features("query", range(QUERIES)).astype(np.float64)
    stored = queries @ view.T
    for side, sign in (("proponents", 1), ("opponents", -1)):
        recall = oracle.recall(oracle.top_ids(sign * true_scores, 10), oracle.top_ids(sign * stored, 10))
        assert abs(getattr(found, side) - recall) <= 0.1  # of 16 queries against 130
        estimates = [getattr(depth, side) for depth in found.true_recall]
        assert estimates[0].lower <= recall <= estimates[0].upper
        assert getattr(found, f"deep_{side}") >= getattr(found, side)
    parts = [np.square(f).reshape(len(f), 2, -1).sum(2) for f in (queries, view)]
    deviation = np.sqrt(parts[0] @ parts[1].T / 128)
    scale = float(np.sqrt(np.mean(((stored - true_scores) / deviation) ** 2)))
    assert 0.5 * scale <= found.error_scale <= 2 * scale
    assert 0.5 <= found.correlation <= 1


def test_error_bars_contain_the_exact_scores(index: InfluenceIndex, true_scores: np.ndarray) -> None:
    answers = index.query(range(60), options=QueryOptions(k=20))
    off = [
        abs(hit.score - true_scores[q, int(hit.id)]) / hit.error
        for q, answer in enumerate(answers)
        for hit in (*answer.proponents, *answer.opponents)
        if hit.error
    ]
    assert len(off) == sum(len(a.proponents) + len(a.opponents) for a in answers)
    assert np.mean(np.array(off) <= 3) >= 0.97


@pytest.mark.parametrize("k", [1, 5, 10])
def test_adaptive_rescoring_answers_as_scoring_all_candidates(
    index: InfluenceIndex, true_scores: np.ndarray, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    plain = ExactScorer.scores

    def counting(scorer: Any, chosen: Any, *rest: Any) -> Any:
        counted.append(len(chosen))
        return plain(scorer, chosen, *rest)

    monkeypatch.setattr(ExactScorer, "scores", counting)
    options = QueryOptions(k=k, rerank="exact", candidates=300, search="scan")
    answers = index.query([3], options=options)
    adaptive, counted[:] = sum(counted), []
    assert [int(hit.id) for hit in answers[0].proponents] == oracle.top_ids(true_scores[3:4], k)[0].tolist()
    assert [int(hit.id) for hit in answers[0].opponents] == oracle.top_ids(true_scores[3:4], k, largest=False)[
        0
    ].tolist()
    monkeypatch.setattr(ranking, "_ERROR_BARS", np.inf)
    everything = index.query([3], options=options)
    assert [h.id for h in everything[0].proponents] == [h.id for h in answers[0].proponents]
    assert adaptive <= sum(counted)
    if k == 1:
        assert adaptive < sum(counted)


def test_a_query_reports_its_strategy_and_reaches_the_requested_recall(index: InfluenceIndex) -> None:
    calibration = index.manifest.index.calibration
    assert calibration is not None
    assert (calibration.queries, calibration.train_queries, calibration.target) == (QUERIES, 0, 0.8)
    lists = index.query([0, 1], options=QueryOptions(search="lists"))
    scan = index.query([0, 1], options=QueryOptions(search="scan"))
    assert lists[0].how.startswith("inverted lists, as requested (estimated times: inverted lists ")
    assert "expected recall@10 of the stored ranking: " in lists[0].how
    assert scan[0].how.startswith("exact scan of the stored rows, as requested; expected true recall@10: ")
    assert scan[0].rows_scored == 2 * N > lists[0].rows_scored
    reach = min(calibration.best(side).lower for side in ("proponents", "opponents"))  # type: ignore[arg-type]
    accurate = index.query([0], options=QueryOptions(search="lists", recall=reach - 1e-6))
    assert accurate[0].rows_scored >= lists[0].rows_scored
    with pytest.raises(UsageError, match="index does not reach this recall: got --recall 0.9999.*--search scan"):
        index.query([0], options=QueryOptions(recall=0.9999))
    with pytest.raises(UsageError, match="cannot be used for this query: got --search lists and the score cosine"):
        index.query([0], options=QueryOptions(search="lists", cosine=True))
    assert "(inverted lists: not for the score cosine)" in index.query([0], options=QueryOptions(cosine=True))[0].how


def test_an_answer_states_the_true_recall_that_is_expected_with_its_candidates(index: InfluenceIndex) -> None:
    fidelity, calibration = index.manifest.fidelity, index.manifest.index.calibration
    assert fidelity is not None and calibration is not None
    exact = index.query([0], options=QueryOptions(rerank="exact", candidates=40, search="scan"))[0].how
    true = fidelity.expect(40)
    assert exact.endswith(
        "; expected true recall@10, re-scored exactly from 40 candidates: "
        f"{true.proponents.summary} for proponents, {true.opponents.summary} for opponents"
    )
    by_lists = index.query([0], options=QueryOptions(search="lists"))[0].how
    point = calibration.fastest_point("proponents", calibration.target)
    assert point is not None and 0 < point.recall < 1
    product = fidelity.true_recall[0].proponents.times(point.recall)
    assert f"; expected true recall@10: {product.summary} for proponents, " in by_lists
    unmeasured = (
        QueryOptions(exact=True),
        QueryOptions(cosine=True),
        QueryOptions(checkpoints=(0,)),
        QueryOptions(rows=RowFilter(only=range(100))),
    )
    assert not any("true recall" in index.query([0], options=options)[0].how for options in unmeasured)


def heavy_tailed_rows(n: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    g = torch.Generator().manual_seed(seed)
    scale = torch.randn(n, generator=g).mul(1.5).exp()
    return [(x * factor, label) for (x, label), factor in zip(rows(n, seed), scale, strict=True)]


def test_a_score_with_a_curvature_matrix_finds_the_best_rows_of_an_index_with_lists(tmp_path: Path) -> None:
    """All ten rows of both directions, by float64 solves, for queries that are not in the index; no removed row."""
    models(tmp_path)
    plain, steps = task(tmp_path), 300.0
    checkpoints = [replace(checkpoint, steps=steps) for checkpoint in plain.checkpoints]
    tailed = replace(plain, train_data=lambda: heavy_tailed_rows(N, 1), checkpoints=checkpoints, loss_is_nll=True)
    build(tailed, tmp_path / "index", replace(CONFIG, yardstick=False))
    (before,) = InfluenceIndex.open(tmp_path / "index", tailed, device="cpu").query([0])
    removed = [hit.row for hit in before.hits]
    remove(tmp_path / "index", removed)
    index = InfluenceIndex.open(tmp_path / "index", tailed, device="cpu")
    present, n_queries = np.setdiff1d(np.arange(N), removed), 20
    score_QN = np.zeros((n_queries, len(present)))
    for checkpoint, rate in enumerate((0.3, 0.1)):
        row_ND = index.view([checkpoint]).take(present).astype(np.float64) / rate**0.5
        query_QD = index.features("query", range(n_queries), [checkpoint]).astype(np.float64) / rate**0.5
        p_N = np.minimum(np.exp(-index.view().store.losses([checkpoint])[present, 0].astype(np.float64)), 1 - 1e-4)
        damped_DD = (row_ND * (p_N / (1 - p_N))[:, None]).T @ row_ND / len(present) + np.eye(128) / (rate * steps)
        solved_QD = np.linalg.solve(damped_DD, query_QD.T).T
        score_QN += solved_QD @ row_ND.T / np.sqrt((solved_QD * query_QD).sum(1, keepdims=True))
    answers = index.query(range(n_queries), options=QueryOptions(k=10))
    for answer, score_N in zip(answers, score_QN, strict=True):
        order = present[np.argsort(-score_N)]
        assert [hit.row for hit in answer.proponents] == order[:10].tolist()
        assert [hit.row for hit in answer.opponents] == order[:-11:-1].tolist()
        assert answer.score == "gauss-newton"
        assert answer.how.endswith(
            "exact scan of the stored rows, recall@10 1.000 (inverted lists: not for the score gauss-newton)"
        )
    message = "cannot be used for this query: got --search lists and the score gauss-newton, expected the score tracin"
    with pytest.raises(UsageError, match=message):
        index.query([0], options=QueryOptions(search="lists"))
    assert index.query([0], options=QueryOptions(search="lists", score="tracin"))[0].how.startswith("inverted lists")


def test_the_faster_strategy_is_chosen(index: InfluenceIndex) -> None:
    record = index.manifest.index
    assert record.calibration is not None
    queries = index.features("query", range(3))
    scan = index.search_index
    for cost, kind in ((Cost(0.0, 1e-9), "flat"), (Cost(9.0, 9.0), "ivf")):
        changed = replace(record, calibration=replace(record.calibration, scan=cost, first_use=FirstUseCost()))
        flat = strategy.FlatIndex(index.view(), torch.device("cpu"))
        chosen = strategy.choose_strategy(changed, scan, flat, queries, QueryOptions())
        assert chosen.index.kind == kind
        assert "estimated to be faster for 3 queries (inverted lists " in chosen.how and ", exact scan " in chosen.how


def test_the_first_use_of_a_store_is_measured_with_files_of_its_own(index: InfluenceIndex, folder: Path) -> None:
    calibration = index.manifest.index.calibration
    assert calibration is not None
    assert calibration.first_use.per_file > 0 and calibration.first_use.per_byte > 0
    store = FeatureStore(folder / "index" / FEATURES, index.manifest.build.layout)
    before = store.view().pending_reads()
    assert before == PendingReads(2, N * 2 * 128 * 2, 2)
    measured = measure_first_use(store)
    assert measured.per_file > 0 and measured.per_byte > 0
    assert store.view().pending_reads() == before


def test_queries_unlike_the_calibration_queries_are_marked(index: InfluenceIndex) -> None:
    record, scan = index.manifest.index, index.search_index
    flat = strategy.FlatIndex(index.view(), torch.device("cpu"))
    queries = index.features("query", range(40))
    options = QueryOptions(search="lists")
    usual = strategy.choose_strategy(record, scan, flat, queries, options)
    assert usual.unlike_Q is not None and not usual.unlike_Q.any()
    shifted = strategy.choose_strategy(record, scan, flat, queries * 5, options)
    assert shifted.unlike_Q is not None and shifted.unlike_Q.all()
    assert "distribution of these queries differs from the calibration queries" in shifted.how
    one = queries.copy()
    one[7] *= 1e5
    odd = strategy.choose_strategy(record, scan, flat, one, options)
    assert odd.unlike_Q is not None and np.flatnonzero(odd.unlike_Q).tolist() == [7]


@pytest.mark.parametrize(
    ("rows_asked", "passing"),
    [
        (RowFilter(only=tuple(range(50))), lambda c: np.arange(N) < 50),
        (RowFilter(without=(0, 7)), lambda c: ~np.isin(np.arange(N), [0, 7])),
        (RowFilter(where=("label=3",)), lambda c: c["label"] == 3),
        (RowFilter(where=("label=1,2", "norm >= 5.5")), lambda c: np.isin(c["label"], [1, 2]) & (c["norm"] >= 5.5)),
        (RowFilter(where=("file!=kind-0", "even=true")), lambda c: (c["file"] != "kind-0") & c["even"]),
        (RowFilter(where=("norm<0",)), lambda c: np.zeros(N, bool)),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        *(QueryOptions(search="scan"), QueryOptions(search="lists"), QueryOptions(cosine=True)),
        *(QueryOptions(rerank="exact"), QueryOptions(exact=True)),
    ],
    ids=["scan", "lists", "cosine", "rescored", "exact"],
)
def test_hits_pass_the_filter_and_none_is_missing(
    index: InfluenceIndex, rows_asked: RowFilter, passing: Any, options: QueryOptions
) -> None:
    held = {name: np.array([columns(row)[name] for row in rows(N, 1)]) for name in ("label", "norm", "even", "file")}
    allowed = np.flatnonzero(passing(held))
    answer = index.query([0], options=replace(options, rows=rows_asked, k=2 * N))[0]
    found = sorted(int(hit.id) for hit in (*answer.proponents, *answer.opponents))
    assert found == allowed.tolist()  # every row that passes has a score other than 0
    few = index.query([0], options=replace(options, rows=rows_asked, k=5))[0]
    assert len(few.proponents) <= 5
    if options.search == "lists" and len(allowed) <= 50:
        assert few.how == f"exact scan of {len(allowed)} rows: inverted lists would score as many"
    if options.search == "scan" or options.exact:
        assert [h.id for h in few.proponents] == [h.id for h in answer.proponents[:5]]
        assert [h.id for h in few.opponents] == [h.id for h in answer.opponents[:5]]
    own = index.self_influence(rows=rows_asked)
    assert sorted(int(row.id) for row in own) == allowed.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RowFilter(where=("colour=3",)), "no column 'colour'.*label, norm, even, file"),
        (RowFilter(where=("label",)), "bad --where.*COLUMN=VALUE"),
        (RowFilter(where=("label=red",)), "bad --where.*a number"),
        (RowFilter(where=("even=maybe",)), "bad --where.*true or false"),
        (RowFilter(only=(N,)), f"bad --only: got {N}, expected 0 to {N - 1}"),
        (RowFilter(without=(-1,)), "bad --without"),
    ],
)
def test_filters_that_are_rejected(index: InfluenceIndex, options: RowFilter, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        index.query([0], options=QueryOptions(rows=options))


@pytest.mark.parametrize(
    "given",
    [
        lambda row: 3,
        lambda row: {"label": [1]},
        lambda row: {"a b": 1},
        lambda row: {"label": 1.0 if row[1] else 1},
        lambda row: {f"label{row[1]}": 1},
    ],
)
def test_columns_that_are_rejected(folder: Path, true_scores: np.ndarray, tmp_path: Path, given: Any) -> None:
    with pytest.raises(TaskError, match=r"Task\.columns"):
        build(replace(task(folder), columns=given), tmp_path / "index", CONFIG)


def test_info_shows_the_measured_quality(index: InfluenceIndex, folder: Path) -> None:
    result = CliRunner().invoke(info, [str(folder / "index")])
    assert result.exit_code == 0
    fidelity, calibration = index.manifest.fidelity, index.manifest.index.calibration
    assert fidelity is not None and calibration is not None
    assert f"rows:       {N:,}, 2 checkpoints x 128" in result.stdout
    assert index.manifest.quality_summary in " ".join(result.stdout.split())
    for point in (*calibration.proponents[-3:], *calibration.opponents[-3:]):
        assert f"{point.recall:.3f}" in result.stdout and f"{point.scored:,.0f}" in result.stdout
    assert CliRunner().invoke(info, [str(folder)]).exit_code != 0


def test_without_the_quality_measurement_no_quality_is_reported(
    folder: Path, true_scores: np.ndarray, tmp_path: Path
) -> None:
    build(task(folder), tmp_path / "index", replace(CONFIG, yardstick=False, index="flat"))
    index = InfluenceIndex.open(tmp_path / "index", task(folder), device="cpu")
    assert index.manifest.fidelity is None and index.manifest.index.calibration is None
    hit = index.query([0], options=QueryOptions(rerank="exact"))[0].proponents[0]
    assert hit.error is None and hit.stored_score is not None
    assert "was not measured" in CliRunner().invoke(info, [str(tmp_path / "index")]).stdout
    with pytest.raises(UsageError, match="search index cannot be used.*got --search lists for an index of kind flat"):
        index.query([0], options=QueryOptions(search="lists"))
