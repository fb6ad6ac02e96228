"""Adapters for dattri and quanda: their metrics on the scores of an index, compared with our own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import toy
from tasks.retrained import QUERIES, N, make_rows, make_task
from tracin_ann import InfluenceIndex, QueryOptions, build
from tracin_ann.evaluation import QuandaExplainer, compute_lds, draw_subsets, make_dattri_arguments

IDS = list(range(QUERIES))
FISHER = QueryOptions(score="fisher")


def make_losses() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(15, 2, QUERIES))


def test_arguments_of_dattri_have_its_shapes_and_sign(index: InfluenceIndex) -> None:
    subsets, losses = draw_subsets(np.arange(N), 15), make_losses()
    score, (targets, rows) = make_dattri_arguments(index.score_matrix("query", IDS), subsets, losses)
    assert (score.shape, targets.shape, rows.shape) == ((N, QUERIES), (15, QUERIES), (15, N // 2))
    np.testing.assert_allclose(targets.numpy(), -(losses[:, 0] + losses[:, 1]) / 2)
    assert rows[3].tolist() == subsets[3].tolist()


def test_dattri_finds_the_same_lds(index: InfluenceIndex) -> None:
    metric = pytest.importorskip("dattri.metric")
    subsets, losses, score_QN = draw_subsets(np.arange(N), 15), make_losses(), index.score_matrix("query", IDS, FISHER)
    found, _ = metric.lds(*make_dattri_arguments(score_QN, subsets, losses))
    np.testing.assert_allclose(found.numpy(), compute_lds(score_QN, subsets, losses).value_Q, atol=1e-9)


def test_the_explainer_returns_the_scores_of_given_samples(index: InfluenceIndex) -> None:
    queries = make_rows(QUERIES, 2)
    explainer = QuandaExplainer(model=None, train_dataset=None, checkpoints=None, index=index, options=FISHER)
    given = torch.stack([x for x, _ in queries[:4]]), torch.tensor([label for _, label in queries[:4]])
    found = explainer.explain(*given)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), index.score_matrix("query", IDS[:4], FISHER), rtol=1e-5, atol=1e-6)


def test_samples_may_be_mappings_and_examples_are_made_of_them(index: InfluenceIndex) -> None:
    queries = make_rows(QUERIES, 2)
    explainer = QuandaExplainer(index=index, make_example=lambda given, target: (given["x"] * given["scale"], target))
    data = {"x": torch.stack([x for x, _ in queries[:3]]) / 2, "scale": torch.full((3,), 2.0)}
    found = explainer.explain(data, [label for _, label in queries[:3]])
    np.testing.assert_allclose(found.numpy(), index.score_matrix("query", IDS[:3]), rtol=1e-5, atol=1e-6)


def test_self_influence_is_the_score_of_each_row_for_itself(index: InfluenceIndex) -> None:
    found = QuandaExplainer(index=index, options=FISHER).self_influence(batch_size=7)
    np.testing.assert_allclose(found.numpy(), np.diag(index.score_matrix("train", range(N), FISHER)), rtol=1e-5)


def test_rows_that_a_build_skipped_have_no_self_influence(tmp_path: Path) -> None:
    rows = [(torch.full((5,), torch.nan), 0), *toy.make_rows(8)]
    task = toy.make_toy_task(tmp_path, train_data=lambda: rows)
    build(task, tmp_path / "index", replace(toy.CONFIG, on_nonfinite="skip", yardstick=False))
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    found = QuandaExplainer(index=index, options=FISHER).self_influence(batch_size=3)
    assert found[0] == 0
    expected = np.diag(index.score_matrix("train", range(1, 9), FISHER)[:, 1:])
    np.testing.assert_allclose(found[1:].numpy(), expected, rtol=1e-5)


def test_metrics_of_quanda_accept_the_explainer(index: InfluenceIndex, folder: Path) -> None:
    downstream = pytest.importorskip("quanda.metrics.downstream_eval", exc_type=ImportError)
    train, model = make_task(folder).train_data(), make_task(folder).model()
    model.load_state_dict(torch.load(folder / "step30.pt", weights_only=True))
    wrong = [row for row in range(N) if row % 9 == 4]
    metric = downstream.MislabelingDetectionMetric(
        model, train, wrong, explainer_cls=QuandaExplainer, expl_kwargs={"index": index}
    )
    ranking = np.argsort(-QuandaExplainer(index=index).self_influence().numpy(), kind="stable")
    found = np.isin(ranking, wrong).cumsum() / len(wrong)
    assert metric.compute()["score"] == pytest.approx(np.trapezoid(found) / N, abs=1e-5)
    classes = downstream.ClassDetectionMetric(model, train)
    queries = make_rows(QUERIES, 2)
    labels = torch.tensor([label for _, label in queries])
    scores = QuandaExplainer(index=index).explain(torch.stack([x for x, _ in queries]), labels)
    classes.update(scores, labels)
    top = scores.topk(5, dim=1).indices.tolist()
    labels_of_top = [[train[row][1] for row in rows] for rows in top]
    expected = [np.mean(np.equal(own, label)) for own, (_, label) in zip(labels_of_top, queries, strict=True)]
    assert classes.compute()["score"] == pytest.approx(np.mean(expected))
