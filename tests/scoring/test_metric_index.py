"""A coded scan in the metric of the default score: what it finds, against dense scores in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build
from tracin_ann.search.coded_scan import CodedScan
from tracin_ann.search.reduction import Metric, fit_reduction

N, QUERIES = 3000, 120


def make_task(folder: Path, **fields: object) -> Task:
    """Return a classifier whose gradients vary much more in some directions than in others."""
    random = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, 24)
    inputs = torch.randn(N + QUERIES, 24, generator=random) * scales
    labels = (inputs / scales @ torch.randn(24, 6, generator=random)).argmax(1)
    torch.manual_seed(0)
    paths = []
    for number in range(2):
        path = folder / f"{number}.pt"
        torch.save(nn.Linear(24, 6).state_dict(), path)
        paths.append(Checkpoint(str(path), learning_rate=0.1 * 3**number, steps=100 * 4**number))
    rows = list(zip(inputs, labels, strict=True))
    return Task(
        model=lambda: nn.Linear(24, 6),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        train_data=lambda: rows[:N],
        query_data=lambda: rows[N:],
        checkpoints=paths,
        loss_is_nll=True,
        **fields,
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> InfluenceIndex:
    folder = tmp_path_factory.mktemp("metric")
    task = make_task(folder)
    build(task, folder / "index", BuildConfig(dim=128, index="codes", yardstick=False))
    return InfluenceIndex.open(folder / "index", task)


def test_the_index_serves_the_default_score(index: InfluenceIndex) -> None:
    record = index.manifest.index
    assert (record.kind, record.score, index.default_score) == ("codes", "gauss-newton", "gauss-newton")
    options = QueryOptions(search="index")
    found = index.query(range(20), options=options)
    assert found[0].how.startswith("score gauss-newton, damping 1 / (learning rate × steps); coded scan, as requested")
    scores = index.score_matrix("query", range(20)).astype(np.float64)
    for answer, score_N in zip(found, scores, strict=True):
        best = np.argsort(-score_N, kind="stable")[:10]
        assert len({hit.row for hit in answer.proponents} & set(best.tolist())) >= 9
        assert [hit.score for hit in answer.proponents] == pytest.approx(
            sorted(score_N[[h.row for h in answer.proponents]])[::-1], rel=1e-4
        )


def test_other_scores_scan_the_rows(index: InfluenceIndex) -> None:
    for options, why in (
        (QueryOptions(score="tracin"), "the score tracin"),
        (QueryOptions(score="fisher"), "the score fisher"),
        (QueryOptions(damping=1.0), "another damping"),
        (QueryOptions(checkpoints=(1,)), "a subset of the checkpoints"),
    ):
        assert (
            f"exact scan of the stored rows, recall@10 1.000 (coded scan: not for {why})"
            in index.query([0], options=options)[0].how
        )


def test_candidates_in_the_metric_are_better_than_without(index: InfluenceIndex) -> None:
    """Few candidates by codes of the mapped rows contain most of the best; those by codes of the rows do not."""
    score = index.make_score()
    queries = score.weigh(index.features("query", range(QUERIES)), range(2)).vector_QF
    scores = index.score_matrix("query", range(QUERIES))
    shares = []
    for metric in (score.metric, None):
        codes = CodedScan.build(index.view(), index.search_index.params, torch.device("cpu"), metric=metric)
        reduced, _ = codes._reduce(queries)
        ids, _ = codes._find_candidates(reduced, 40, codes.settings[0], None)
        best = np.argsort(-scores, axis=1)[:, :10]
        shares.append(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(ids, best, strict=True)]))
    assert shares[0] > 0.95
    assert shares[0] >= shares[1]


def test_a_metric_preserves_inner_products() -> None:
    random = np.random.default_rng(0)
    factor = np.tril(random.standard_normal((2, 5, 5))) + 3 * np.eye(5)
    metric = Metric(np.linalg.inv(factor).astype(np.float32), factor.swapaxes(1, 2).astype(np.float32))
    rows, queries = random.standard_normal((2, 40, 10)).astype(np.float32)
    for scaled in (metric, metric.scale_to(rows)):
        reduction = scaled.compose(fit_reduction(scaled.map_rows(rows), 10, 0, rotate=True))
        products = reduction.apply(rows) @ (queries @ reduction.query_basis_FR).T
        assert products == pytest.approx(rows @ queries.T, rel=1e-3, abs=1e-3)
        assert reduction.apply(rows) @ reduction.apply(rows).T == pytest.approx(
            scaled.map_rows(rows) @ scaled.map_rows(rows).T, rel=1e-3, abs=1e-4
        )
    largest = np.linalg.norm(metric.scale_to(rows).map_rows(rows), axis=1).max()
    assert 1 <= largest < 2
