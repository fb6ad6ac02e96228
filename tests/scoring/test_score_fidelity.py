"""The true recall of the default score with a curvature matrix: measured by the build, stated by answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from tracin_ann.choices import ScoreName
from tracin_ann.cli.info import main as info
from tracin_ann.errors import NonFiniteError
from tracin_ann.operations import remove
from tracin_ann.scoring import exact_preconditioning, exact_work
from tracin_ann.scoring.exact_work import ExactWork
from tracin_ann.serve.pages.overview import summarise_index
from tracin_ann.store import Manifest, ParameterSpec
from tracin_ann.store.columns import RowFilter
from tracin_ann.store.manifest import MANIFEST, content_digest

N, QUERIES, STEPS = 700, 40, 200.0
RATES = (0.3, 0.1)
NOT_MEASURED = "that by gauss-newton was not measured: compare some answers with those of --exact"
CONFIG = BuildConfig(dim=64, batch_size=100, device="cpu", index="flat")


def make_rows(n: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 8, generator=random) * torch.logspace(0.5, -1, 8)
    labels = (inputs[:, 0] > 0).long() + 2 * (inputs[:, 1] > 0).long()
    return [(x, int(label)) for x, label in zip(inputs, labels, strict=True)]


def compute_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def make_models(folder: Path) -> list[nn.Module]:
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(make_model())
        torch.save(models[-1].state_dict(), folder / f"{seed}.pt")
    return models


def make_task(folder: Path, rows: Sequence[Any] | None = None, **fields: Any) -> Task:
    train = make_rows(N, 1) if rows is None else rows
    checkpoints = [Checkpoint(folder / f"{i}.pt", learning_rate=rate, steps=STEPS) for i, rate in enumerate(RATES)]
    return Task(
        model=make_model,
        train_data=lambda: train,
        query_data=lambda: make_rows(QUERIES, 2),
        **{"loss": compute_loss, "checkpoints": checkpoints, "loss_is_nll": True, **fields},
    )


def compute_true_scores(models: Sequence[nn.Module], damping_C: Sequence[float]) -> np.ndarray:
    """Return exact scores [Q, N] by dense matrices in float64, each row without its own term."""
    total_QN = np.zeros((QUERIES, N))
    for model, damping in zip(models, damping_C, strict=True):
        row_NP, query_QP = (
            oracle.gradients(model, compute_loss, rows).numpy() for rows in (make_rows(N, 1), make_rows(QUERIES, 2))
        )
        with torch.no_grad():
            loss_N = compute_loss(model, torch.utils.data.default_collate(make_rows(N, 1))).double().numpy()
        p_N = np.minimum(np.exp(-loss_N), 1 - 1e-4)
        weight_N = p_N / (1 - p_N)
        matrix_PP = (row_NP * weight_N[:, None]).T @ row_NP / N + damping * np.eye(row_NP.shape[1])
        solved_QP = np.linalg.solve(matrix_PP, query_QP.T).T
        own_N = weight_N * np.einsum("np,np->n", row_NP, np.linalg.solve(matrix_PP, row_NP.T).T) / N
        norm_Q = np.sqrt((solved_QP * query_QP).sum(1, keepdims=True))
        total_QN += solved_QP @ row_NP.T / norm_Q / (1 - own_N)
    return total_QN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("score-fidelity")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def index(folder: Path) -> InfluenceIndex:
    build(make_task(folder), folder / "index", CONFIG)
    return InfluenceIndex.open(folder / "index", make_task(folder), device="cpu")


def test_the_true_recall_equals_brute_force(index: InfluenceIndex, folder: Path) -> None:
    """All rows are scored exactly; the build measures 16 of the 40 queries."""
    measured = index.manifest.score_fidelity
    assert measured is not None
    assert (measured.score, measured.fidelity.queries, measured.fidelity.rows) == ("gauss-newton", 16, N)
    assert measured.summary == "score gauss-newton, damping 1 / (learning rate × steps)"
    true_QN = compute_true_scores(make_models(folder), [1 / (rate * STEPS) for rate in RATES])
    stored_QN = index.score_matrix("query", range(QUERIES)).astype(np.float64)
    asked = np.sort(np.random.default_rng(CONFIG.seed + 1).permutation(QUERIES)[:16])
    for side, sign in (("proponents", 1), ("opponents", -1)):
        for depth in measured.fidelity.true_recall[:2]:
            tops = oracle.top_ids(sign * true_QN[asked], 10)
            found = oracle.top_ids(sign * stored_QN[asked], depth.candidates)
            shares = [len({*map(int, top)} & {*map(int, own)}) / 10 for top, own in zip(tops, found, strict=True)]
            assert getattr(depth, side).mean == pytest.approx(np.mean(shares), abs=1e-9)
    first = measured.fidelity.true_recall[0]
    assert 0.1 < first.proponents.mean < 0.99, "an easy case would show nothing"
    correlation = np.mean([np.corrcoef(t, s)[0, 1] for t, s in zip(true_QN[asked], stored_QN[asked], strict=True)])
    assert measured.fidelity.correlation == pytest.approx(correlation, abs=0.05)
    assert index.manifest.fidelity is not None and index.manifest.fidelity != measured.fidelity


@pytest.mark.parametrize(("score", "method"), [("fisher", "Gram"), ("trak", "Gram"), ("gauss-newton", "EK-FAC")])
def test_the_truth_is_that_of_exact_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: ScoreName, method: str
) -> None:
    if method == "EK-FAC":
        monkeypatch.setattr(exact_preconditioning, "_MOST_PRODUCTS", 0)
    task = make_task(folder, score=score)
    measured = build(task, tmp_path / "index", CONFIG).manifest.score_fidelity
    assert measured is not None and measured.score == score
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    asked = np.sort(np.random.default_rng(CONFIG.seed + 1).permutation(QUERIES)[:16]).tolist()
    answers = index.query(asked, options=QueryOptions(exact=True, k=10))
    assert ("EK-FAC" in answers[0].how) == (method == "EK-FAC")
    stored_QN = index.score_matrix("query", asked)
    found = zip(oracle.top_ids(stored_QN, 10), oracle.top_ids(-stored_QN, 10), answers, strict=True)
    shares = [
        [len({hit.row for hit in hits} & {*map(int, top)}) / 10 for hits, top in ((a.proponents, p), (a.opponents, o))]
        for p, o, a in found
    ]
    first = measured.fidelity.true_recall[0]
    assert [first.proponents.mean, first.opponents.mean] == pytest.approx(np.mean(shares, axis=0), abs=1e-9)


def test_answers_state_the_true_recall_of_their_score(index: InfluenceIndex) -> None:
    manifest = index.manifest
    assert manifest.score_fidelity is not None and manifest.fidelity is not None
    for score, fidelity in (("gauss-newton", manifest.score_fidelity.fidelity), ("tracin", manifest.fidelity)):
        first, deep = fidelity.true_recall[0], fidelity.expect(40)
        for options, among, recall in (
            (QueryOptions(score=score), "", first),
            (QueryOptions(score=score, rerank="exact", candidates=40), ", re-scored exactly from 40 candidates", deep),
        ):
            assert index.query([0], options=options)[0].how.endswith(
                f"; expected true recall@10{among}: {recall.proponents.summary} for proponents, "
                f"{recall.opponents.summary} for opponents"
            )
    assert index.query([0])[0].how == index.query([0], options=QueryOptions(score="gauss-newton"))[0].how


@pytest.mark.parametrize(
    "options",
    [
        QueryOptions(damping=1e-2),
        QueryOptions(checkpoints=(1,)),
        QueryOptions(score="fisher"),
        QueryOptions(score="trak"),
        QueryOptions(exact=True),
        QueryOptions(rows=RowFilter(only=range(100))),
    ],
)
def test_answers_state_nothing_that_was_not_measured(index: InfluenceIndex, options: QueryOptions) -> None:
    assert "true recall" not in index.query([0], options=options)[0].how


def test_a_damping_by_another_rule_was_not_measured(index: InfluenceIndex, folder: Path, tmp_path: Path) -> None:
    """An index of a version with another rule for the damping."""
    measured = index.manifest.score_fidelity
    assert measured is not None
    other = replace(measured, summary="score gauss-newton, damping 1e-3 of the trace")
    index.manifest = replace(index.manifest, score_fidelity=other)
    assert "true recall" not in index.query([0])[0].how
    index.manifest = replace(index.manifest, score_fidelity=measured)
    assert "true recall" in index.query([0])[0].how


def test_info_shows_the_fidelity_of_both_scores(index: InfluenceIndex, folder: Path) -> None:
    manifest = index.manifest
    assert manifest.score_fidelity is not None and manifest.fidelity is not None
    text = " ".join(CliRunner().invoke(info, [str(folder / "index")]).stdout.split())
    for by, fidelity in (("", manifest.fidelity), (" by gauss-newton", manifest.score_fidelity.fidelity)):
        first = fidelity.true_recall[0]
        shown = f"{first.proponents.summary} of the proponents, {first.opponents.summary} of the opponents"
        assert f"true top 10{by} among the first 10 rows: {shown}" in text
    assert f"quality: recall@10 by gauss-newton {manifest.score_fidelity.fidelity.proponents:.2f} (prop" in text


def test_the_overview_of_the_server_shows_both_scores(index: InfluenceIndex) -> None:
    manifest = index.manifest
    assert manifest.score_fidelity is not None and manifest.fidelity is not None
    view = summarise_index(index)
    assert [what for what, *_ in view.recalls] == [
        f"{what} by {score}"
        for score in ("gauss-newton", "tracin")
        for what in ("stored features", "exact scores of 100 candidates", "exact scores of 1,000 candidates")
    ]
    shown = [manifest.score_fidelity.fidelity, manifest.fidelity]
    assert [view.recalls[3 * i][1] for i in range(2)] == [each.true_recall[0].proponents.summary for each in shown]
    correlations = f"{shown[0].correlation:.2f} by gauss-newton and {shown[1].correlation:.2f} by tracin."
    assert view.recall_note.endswith(correlations)
    assert view.quality.startswith("recall@10 by gauss-newton ")


def test_a_change_of_the_rows_leaves_no_old_figure(folder: Path, tmp_path: Path) -> None:
    rows, out = make_rows(N, 1), tmp_path / "index"
    before = build(make_task(folder, rows[:500]), out, CONFIG).manifest.score_fidelity
    appended = build(make_task(folder, rows), out, replace(CONFIG, append=True)).manifest.score_fidelity
    assert before is not None and appended is not None
    assert (before.fidelity.rows, appended.fidelity.rows) == (500, N)
    removed = remove(out, [0, 7])
    assert removed.score_fidelity is None and removed.fidelity is not None
    index = InfluenceIndex.open(out, make_task(folder, rows), device="cpu")
    assert "true recall" not in index.query([0])[0].how
    assert (
        "that by gauss-newton was not measured: compare some answers with those of --exact" in removed.quality_summary
    )
    rebuilt = build(make_task(folder, rows), out, replace(CONFIG, rebuild_index=True)).manifest
    assert rebuilt.score_fidelity is not None and rebuilt.removed is not None
    assert rebuilt.score_fidelity.fidelity != appended.fidelity


def test_another_default_score_and_more_checkpoints_are_measured(folder: Path, tmp_path: Path) -> None:
    task, out = make_task(folder), tmp_path / "index"
    first = build(replace(task, checkpoints=task.checkpoints[:1]), out, CONFIG).manifest.score_fidelity
    both = build(task, out, replace(CONFIG, add_checkpoint=True)).manifest.score_fidelity
    fisher = build(replace(task, score="fisher"), out, CONFIG).manifest.score_fidelity
    plain = build(replace(task, score="tracin"), out, CONFIG).manifest
    assert first is not None and both is not None and fisher is not None
    assert (both.score, fisher.score) == ("gauss-newton", "fisher")
    assert fisher.summary == "score fisher, damping 1 / (learning rate × steps)"
    assert len({first.fidelity, both.fidelity, fisher.fidelity}) == 3
    assert plain.score_fidelity is None and plain.fidelity is not None
    assert "by" not in plain.quality_summary


def test_scores_without_an_exact_form_are_not_measured(folder: Path, tmp_path: Path) -> None:
    manifest = build(make_task(folder, score="trackstar"), tmp_path / "index", CONFIG).manifest
    assert manifest.score_fidelity is None
    assert manifest.quality_summary.endswith("; that by trackstar was not measured")


def test_without_the_quality_measurement_there_is_no_figure(folder: Path, tmp_path: Path) -> None:
    manifest = build(make_task(folder), tmp_path / "index", replace(CONFIG, yardstick=False)).manifest
    assert manifest.score_fidelity is None and manifest.quality_summary == "recall was not measured (--no-yardstick)"


def test_manifests_of_earlier_versions_are_read(index: InfluenceIndex, folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "index" / MANIFEST).read_text())
    del content["digest"], content["score_fidelity"]
    number = content.pop("format")
    (tmp_path / MANIFEST).write_text(json.dumps({"format": number, "digest": content_digest(content), **content}))
    assert Manifest.read(tmp_path) == replace(index.manifest, score_fidelity=None)


@pytest.mark.parametrize("n", [1, 6])
def test_few_rows(folder: Path, tmp_path: Path, n: int) -> None:
    task = make_task(folder, make_rows(n, 1))
    build(task, tmp_path / "index", CONFIG)
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    measured = index.manifest.score_fidelity
    assert measured is not None and measured.fidelity.rows == n
    assert measured.fidelity.true_recall[0].proponents.mean == 1
    assert "expected true recall@10: 1.00 (1.00 to 1.00) for proponents" in index.query([0])[0].how


def test_gradients_that_are_zero(folder: Path, tmp_path: Path) -> None:
    """All training rows are fitted so well that their gradients are zero in float32."""
    rows = [(torch.zeros(8), 0)] * 30
    task = make_task(folder, rows, loss=lambda model, batch: 0 * compute_loss(model, batch), query_loss=compute_loss)
    build(task, tmp_path / "index", CONFIG)
    index = InfluenceIndex.open(tmp_path / "index", task, device="cpu")
    measured = index.manifest.score_fidelity
    assert measured is not None
    assert measured.fidelity.correlation == 1 and measured.fidelity.error_scale == 0
    assert index.query([0])[0].hits == ()


def test_a_curvature_that_is_not_finite_does_not_end_the_build(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tracin_ann.scoring.exact_preconditioning.compute_gram", _raise_nonfinite)
    manifest = build(make_task(folder), tmp_path / "index", CONFIG).manifest
    assert manifest.fidelity is not None and manifest.score_fidelity is None
    assert "the fidelity of gauss-newton is not measured: too large" in caplog.text


def _raise_nonfinite(*_: object) -> None:
    raise NonFiniteError("too large")


def test_progress_of_the_exact_curvature_is_reported(folder: Path, tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    build(make_task(folder), tmp_path / "index", CONFIG, progress=lambda stage, *part: seen.__setitem__(stage, part))
    for stage in ("fidelity", "fidelity of gauss-newton", "curvature", "inverse curvature"):
        done, total = seen[stage]
        assert done == total > 0


def test_a_build_does_not_measure_what_takes_longer_than_its_features(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_work, "_SMALL_WORK", 0)
    manifest = build(make_task(folder), tmp_path / "index", CONFIG).manifest
    assert manifest.fidelity is not None and manifest.score_fidelity is None
    assert NOT_MEASURED in manifest.quality_summary


def test_the_work_of_exact_scores() -> None:
    """Outer products make it small; long sequences, many parameters and few rows make it large."""
    mlp = [ParameterSpec("a", (128, 784), "torch.float32", True), ParameterSpec("b", (64, 128), "torch.float32", True)]
    assert ExactWork(mlp, 3, 5000, 16, 2500).is_small
    assert not ExactWork(mlp, 30, 5000, 16, 2500).is_small
    assert ExactWork(mlp, 30, 200_000, 16, 2500).is_small
    sequences = [replace(parameter, rank_one=False) for parameter in mlp]
    assert not ExactWork(sequences, 1, 5000, 16, 2500).is_small
    assert ExactWork(sequences, 1, 10_000_000, 16, 2500).is_small
    large = [ParameterSpec("a", (4096, 4096), "torch.float32")] * 24
    assert not ExactWork(large, 1, 20_000, 2, 2500).is_small
    assert ExactWork(large, 1, 1_000_000, 2, 2500).is_small
