"""Indexes of a default score with a curvature matrix: what they find, against dense scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tracin_ann import BuildConfig, Checkpoint, InfluenceIndex, QueryOptions, Task, build

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


def test_bounds_serve_every_score_that_multiplies_the_rows(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    build(task, tmp_path / "index", BuildConfig(dim=128, index="bounds", yardstick=False))
    index = InfluenceIndex.open(tmp_path / "index", task)
    calibration = index.manifest.index.calibration
    assert calibration is not None
    assert [point.lower for point in (*calibration.proponents, *calibration.opponents)] == [1.0, 1.0]
    for options in (
        QueryOptions(),
        QueryOptions(recall=0.99999),
        QueryOptions(score="tracin"),
        QueryOptions(score="fisher", damping=1e-3),
    ):
        found, scanned = (
            index.query(range(20), options=replace(options, search=search)) for search in ("index", "scan")
        )
        assert "exact search by bounds, as requested" in found[0].how
        assert "; exact: " in found[0].how and "of the rows scored for proponents and opponents" in found[0].how
        assert "expected recall@10" not in found[0].how
        for one, other in zip(found, scanned, strict=True):
            assert (one.proponents, one.opponents) == (other.proponents, other.opponents)
    assert "exact search by bounds: not for" in index.query([0], options=QueryOptions(score="trackstar"))[0].how
